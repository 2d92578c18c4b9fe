"""The stored records: what is written is what is read, by us and by plain `datasets`, and damage is named."""

import json
import pickle
from functools import partial

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.sealing import seal_records
from vlm_vqa.data import records
from vlm_vqa.data.decoding import open_image
from vlm_vqa.errors import UserError
from vlm_vqa.fetch import write_records as fetching
from vlm_vqa.sealed import SWITCH

PIXELS = 1_000_000


@pytest.fixture
def stored(vqav2_folder, directory_params, tmp_path, monkeypatch):
    """(official folder, records folder): 5 + 2 images, 2 a row group, and more than one shard."""
    monkeypatch.setattr(fetching, "_IMAGES_PER_GROUP", 2)
    monkeypatch.setattr(fetching, "_BYTES_PER_SHARD", 2500)
    source = vqav2_folder(train_images=5)
    fetching.fetch(directory_params(source), tmp_path / "records")
    return source, tmp_path / "records"


def read(folder, kind, split):
    name = {
        "questions": "v2_OpenEnded_mscoco_{}2014_questions.json",
        "annotations": "v2_mscoco_{}2014_annotations.json",
    }
    return json.loads((folder / name[kind].format(split)).read_text())[kind]


@pytest.mark.parametrize("split", records.SPLITS)
def test_questions_keep_the_order_and_all_answers_of_their_file(stored, split):
    source, folder = stored
    loaded = records.load_questions(folder, split)
    assert loaded.features == records.question_features()
    questions, annotations = read(source, "questions", split), read(source, "annotations", split)
    assert [row["question"] for row in questions] == loaded["question"]
    for question, annotation, row in zip(questions, annotations, loaded, strict=True):
        assert row["question_id"] == question["question_id"] and row["image_id"] == question["image_id"]
        assert row["answers"] == [answer["answer"] for answer in annotation["answers"]]
        assert row["answer_confidences"] == ["yes"] * 10
        for key in ("question_type", "answer_type", "multiple_choice_answer"):
            assert row[key] == annotation[key]


def test_images_come_once_by_ascending_id_as_the_bytes_they_were(stored):
    source, folder = stored
    images = list(records.iter_images(folder))
    ids = sorted({row["image_id"] for split in records.SPLITS for row in read(source, "questions", split)})
    assert [image.image_id for image in images] == ids
    assert len(list(records.iter_images(folder))) == len(ids) == 7
    for image in images:
        (path,) = source.glob(f"*2014/{image.file_name}")
        assert image.data == path.read_bytes()


def test_images_are_stored_in_small_groups_and_several_files(stored):
    shards = sorted(stored[1].glob("images-*.parquet"))
    assert [path.name for path in shards] == [records.image_shard(index, len(shards)) for index in range(len(shards))]
    assert len(shards) > 1
    for path in shards:
        metadata = pq.read_metadata(path)
        assert all(metadata.row_group(group).num_rows <= 2 for group in range(metadata.num_row_groups))


def test_plain_datasets_reads_the_files(stored, tmp_path):
    _, folder = stored
    load = partial(datasets.load_dataset, "parquet", split="train", cache_dir=str(tmp_path / "cache"))
    train = load(data_files=str(folder / "questions-train.parquet"))
    assert train.features == records.question_features()
    assert train.to_list() == records.load_questions(folder, "train").to_list()
    images = load(data_files=sorted(map(str, folder.glob("images-*.parquet"))))
    assert images.features == records.image_features()
    for row, image in zip(images, records.iter_images(folder), strict=True):
        assert row["image"].size == (row["width"], row["height"]) == (32, 24)
        ours = open_image(image.data, image.file_name, PIXELS)
        assert np.array_equal(np.asarray(row["image"]), np.asarray(ours))


def test_some_images_are_found_without_reading_the_others(stored, monkeypatch):
    _, folder = stored
    everything = list(records.iter_images(folder))
    read, read_columns = [], records._read_columns
    monkeypatch.setattr(records, "_read_columns", lambda *where: read.append(where) or read_columns(*where))
    wanted = {everything[-1].image_id, everything[1].image_id}
    absent = {0, max(wanted) + 1}
    assert list(records.images_of(folder, wanted)) == [everything[1], everything[-1]]
    assert len(read) == 2
    for image_id in absent:
        with pytest.raises(UserError, match=f"no image {image_id} of the questions.*fetch-vqav2"):
            list(records.images_of(folder, {image_id}))


@pytest.mark.parametrize("checks", ["on", "off"])
def test_images_come_by_id_in_any_order_whichever_process_asks(stored, monkeypatch, checks):
    """Forked workers of a data loader share the place of reading in every file that was open before."""
    monkeypatch.setenv(SWITCH, checks)
    _, folder = stored
    everything = list(records.iter_images(folder))
    images = records.Images(folder)
    assert [images[image.image_id] for image in everything[::-1]] == everything[::-1]
    ids = [image.image_id for image in everything] * 40
    loader = torch.utils.data.DataLoader(ids, batch_size=1, num_workers=2, collate_fn=lambda found: images[found[0]])
    assert list(loader) == everything * 40
    assert pickle.loads(pickle.dumps(images))[ids[3]] == everything[3]


def test_a_flipped_bit_is_found_where_one_image_is_read(stored):
    _, folder = stored
    images, (first, *_) = records.Images(folder), records.iter_images(folder)
    path = folder / records.image_shard(0, len(list(folder.glob("images-*"))))
    data = bytearray(path.read_bytes())
    data[data.index(first.data) + len(first.data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged at byte .*repair fetch-vqav2"):
        images[first.image_id]


def test_a_missing_shard_is_named(stored):
    _, folder = stored
    sorted(folder.glob("images-*.parquet"))[-1].unlink()
    with pytest.raises(UserError, match="not complete.*fetch-vqav2"):
        next(records.iter_images(folder))


@pytest.mark.parametrize("name", ["questions-train.parquet", "images-00000-of-"])
def test_damaged_parquet_is_named(stored, name):
    _, folder = stored
    (path,) = (path for path in folder.iterdir() if path.name.startswith(name))
    data = path.read_bytes()
    # Once cut in half, once whole but with its first pages overwritten.
    for damaged in (data[: len(data) // 2], b"PAR1" + b"\xff" * (len(data) // 2) + data[4 + len(data) // 2 :]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{name}.*fetch-vqav2"):
            records.load_questions(folder, "train") if "questions" in name else list(records.iter_images(folder))


def test_other_columns_are_refused(stored):
    _, folder = stored
    pq.write_table(pa.table({"question_id": [1]}), folder / "questions-val.parquet")
    seal_records(folder)
    with pytest.raises(UserError, match="questions-val.parquet: columns are not those of the records"):
        records.load_questions(folder, "val")


def test_missing_records_say_which_stage_makes_them(tmp_path):
    for read_it in (records.read_manifest, lambda folder: records.load_questions(folder, "val")):
        with pytest.raises(UserError, match="vlm-vqa repair fetch-vqav2"):
            read_it(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"schema_version": 999}'])
def test_another_manifest_is_refused(stored, content):
    _, folder = stored
    (folder / records.MANIFEST).write_text(content)
    with pytest.raises(UserError, match="manifest.json.*fetch-vqav2"):
        records.read_manifest(folder)
