"""Fetching as a whole: manifest, determinism, archives, interruption, and the real sample."""

import gzip
import json
import os
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from vlm_vqa import files
from vlm_vqa.data import records
from vlm_vqa.data.decoding import open_image
from vlm_vqa.errors import UserError
from vlm_vqa.fetch import write_records as fetching
from vlm_vqa.fetch.sources import official_layout
from vlm_vqa.fetch.write_records import fetch
from vlm_vqa.hashing import sha256_file
from vlm_vqa.sealed import fingerprint

QUESTIONS = "v2_OpenEnded_mscoco_train2014_questions.json"
ANNOTATIONS = "v2_mscoco_train2014_annotations.json"
IMAGE = "train2014/COCO_train2014_000000000025.jpg"


def a_socket(path):
    os.mknod(path, stat.S_IFSOCK | 0o600)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_manifest_counts_and_hashes_what_is_there(vqav2_folder, directory_params, tmp_path):
    source = vqav2_folder()
    returned = fetch(directory_params(source), tmp_path / "records")
    manifest = records.read_manifest(tmp_path / "records")
    assert manifest == returned
    assert manifest["source"] == "directory" and manifest["images"] == 6 and manifest["notes"] == []
    assert manifest["splits"]["train"] == {
        "questions": 12,
        "images": 4,
        "answer_types": {"yes/no": 4, "number": 4, "other": 4},
        "answers_per_question": {"10": 12},
        "unsaid_answers": 0,
        "asked_in_both": 0,
        "dropped": 0,
        "dropped_records": [],
        "inputs": {
            "questions": {"name": QUESTIONS, "sha256": sha256_file(source / QUESTIONS)},
            "annotations": {"name": ANNOTATIONS, "sha256": sha256_file(source / ANNOTATIONS)},
        },
    }
    files = {path.name: fingerprint(path) for path in (tmp_path / "records").glob("*.parquet")}
    assert manifest["files"] == files and len(files) == 3


def test_two_runs_write_the_same_bytes(vqav2_folder, directory_params, tmp_path):
    for name in ("one", "two"):
        fetch(directory_params(vqav2_folder(f"source-{name}")), tmp_path / name)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_gzip_bomb_is_bounded_as_a_zip_is(vqav2_folder, directory_params, tmp_path, monkeypatch):
    folder = vqav2_folder()
    path = folder / "v2_mscoco_train2014_annotations.json"
    path.write_bytes(gzip.compress(bytes(10**6)))
    monkeypatch.setattr(official_layout, "MOST_BYTES", 10**5)
    with pytest.raises(UserError, match="train2014_annotations.json: .*unpacks to more than 100,000 bytes"):
        fetch(directory_params(folder), tmp_path / "records")


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir, a_socket])
@pytest.mark.parametrize("which", ["v2_OpenEnded_mscoco_train2014_questions.json", "train2014", "an image"])
def test_what_is_no_file_is_not_read(make, which, vqav2_folder, directory_params, tmp_path):
    folder = vqav2_folder()
    path = next((folder / "train2014").iterdir()) if which == "an image" else folder / which
    path.rename(folder / "away")
    make(path)
    with pytest.raises(UserError, match="no records were made"):
        fetch(directory_params(folder), tmp_path / "records")


def test_two_at_once_are_refused(vqav2_folder, directory_params, tmp_path):
    params, target = directory_params(vqav2_folder()), tmp_path / "records"
    with files.claim(tmp_path / "records.lock", "held"):
        with pytest.raises(UserError, match="records: another fetch-vqav2 is writing there"):
            fetch(params, target)
    assert fetch(params, target)["images"] == 6


def test_archives_and_gzip_give_the_same_data(vqav2_folder, directory_params, tmp_path):
    plain = fetch(directory_params(vqav2_folder("plain")), tmp_path / "plain-records")
    folder = vqav2_folder("packed")
    for path in folder.glob("*.json"):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    for split in records.SPLITS:
        shutil.make_archive(folder / f"{split}2014", "zip", folder, f"{split}2014")
        shutil.rmtree(folder / f"{split}2014")
    params = directory_params(folder)
    train, val = (
        replace(
            files,
            images=f"{files.images}.zip",
            questions=f"{files.questions}.gz",
            annotations=f"{files.annotations}.gz",
        )
        for files in (params.train, params.val)
    )
    packed = fetch(replace(params, train=train, val=val), tmp_path / "packed-records")
    assert packed["data_hash"] == plain["data_hash"] and packed["files"] == plain["files"]


def test_the_data_hash_follows_texts_and_pixels_alone(vqav2_folder, directory_params, tmp_path, monkeypatch):
    folder = vqav2_folder()
    before = fetch(directory_params(folder), tmp_path / "records")
    monkeypatch.setattr(fetching, "_BYTES_PER_SHARD", 1)
    monkeypatch.setattr(fetching, "_IMAGES_PER_GROUP", 1)
    sharded = fetch(directory_params(folder), tmp_path / "records")
    assert sharded["files"].keys() != before["files"].keys() and sharded["data_hash"] == before["data_hash"]
    text = (folder / ANNOTATIONS).read_text()
    (folder / ANNOTATIONS).write_text(text.replace('"maybe"', '"perhaps"', 1))
    answer = fetch(directory_params(folder), tmp_path / "records")
    (folder / ANNOTATIONS).write_text(text)
    Image.new("RGB", (32, 24), (1, 2, 3)).save(folder / IMAGE)
    pixels = fetch(directory_params(folder), tmp_path / "records")
    assert len({before["data_hash"], answer["data_hash"], pixels["data_hash"]}) == 3


def test_images_without_questions_are_left_out(vqav2_folder, directory_params, tmp_path):
    folder = vqav2_folder()
    (folder / "train2014" / "COCO_train2014_000000000001.jpg").write_text("not even an image")
    assert fetch(directory_params(folder), tmp_path / "records")["images"] == 6


@pytest.mark.parametrize("main", ["", None])
def test_without_a_main_answer_the_most_common_is_taught(main, vqav2_folder, directory_params, tmp_path):
    folder = vqav2_folder()
    content = json.loads((folder / ANNOTATIONS).read_text())
    for annotation in content["annotations"]:
        annotation["multiple_choice_answer"] = main
        annotation["answers"] = ["", "", "", "b", {"answer": "a"}, "a", "b"]
    (folder / ANNOTATIONS).write_text(json.dumps(content))
    manifest = fetch(directory_params(folder), tmp_path / "records")
    rows = records.load_questions(tmp_path / "records", "train")
    assert set(rows["multiple_choice_answer"]) == {"b"} and set(map(len, rows["answers"])) == {7}
    assert manifest["splits"]["train"]["answers_per_question"] == {"7": 12}


def test_a_failed_fetch_leaves_earlier_records_as_they_were(vqav2_folder, directory_params, tmp_path, monkeypatch):
    folder, target = vqav2_folder(), tmp_path / "records"
    fetch(directory_params(folder), target)
    before = contents(target)
    # Violations, and an interruption after everything but the manifest is written.
    image = (folder / IMAGE).read_bytes()
    (folder / IMAGE).write_bytes(image[:100])
    with pytest.raises(UserError):
        fetch(directory_params(folder), target)
    assert contents(target) == before
    (folder / IMAGE).write_bytes(image)
    monkeypatch.setattr(fetching, "write_sealed", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch(directory_params(folder), target)
    assert contents(target) == before


def test_records_half_moved_do_not_count_as_records(vqav2_folder, directory_params, tmp_path, monkeypatch):
    folder, target = vqav2_folder(), tmp_path / "records"
    fetch(directory_params(folder), target)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fetching, "publish", interrupt)
        fetch(directory_params(folder), target)
    with pytest.raises(UserError, match="manifest.json"):
        records.read_manifest(target)
    fetch(directory_params(folder), target)
    assert records.read_manifest(target)["images"] == len(list(records.iter_images(target))) == 6


def interrupt(*_):
    raise KeyboardInterrupt


def test_files_of_an_earlier_run_do_not_stay(vqav2_folder, directory_params, tmp_path, monkeypatch):
    folder, target = vqav2_folder(), tmp_path / "records"
    with monkeypatch.context() as patch:
        patch.setattr(fetching, "_BYTES_PER_SHARD", 1)
        patch.setattr(fetching, "_IMAGES_PER_GROUP", 1)
        fetch(directory_params(folder), target)
    # What a run that was killed outright leaves behind.
    part = target / ".part"
    part.mkdir()
    (part / "0.parquet").write_text("half")
    manifest = fetch(directory_params(folder), target)
    assert {path.name for path in target.iterdir()} == {*manifest["files"], records.REPORT, records.MANIFEST}
    assert len(list(records.iter_images(target))) == 6 and not part.exists()


def test_a_link_to_another_disk_stays_one(vqav2_folder, directory_params, tmp_path):
    (tmp_path / "large").mkdir()
    (tmp_path / "records").symlink_to("large")
    params = directory_params(vqav2_folder())
    assert fetch(params, tmp_path / "records") == fetch(params, tmp_path / "records")
    assert len(list(records.iter_images(tmp_path / "large"))) == 6 and (tmp_path / "records").is_symlink()


def test_large_images_make_smaller_row_groups(monkeypatch):
    monkeypatch.setattr(fetching, "_BYTES_PER_GROUP", 10)
    rows = [{"image": {"bytes": b"x" * size}} for size in (3, 3, 9, 12, 1)]
    assert [len(group) for group in fetching._groups(rows, 100)] == [3, 1, 1]
    assert [len(group) for group in fetching._groups(rows, 2)] == [2, 2, 1]


def test_a_missing_folder_is_named(directory_params, tmp_path):
    with pytest.raises(UserError, match="data.directory is .*nowhere.*data/vqav2/README.md"):
        fetch(directory_params(tmp_path / "nowhere"), tmp_path / "records")


def test_the_real_sample_runs_through(shared_data, directory_params, tmp_path):
    files = {"questions": "questions.json", "annotations": "annotations.json", "images": "images"}
    params = directory_params(shared_data / "vqav2-sample", allow_split_overlap=True)
    train = replace(params.train, **files)
    manifest = fetch(replace(params, train=train, val=train), tmp_path / "records")
    for split in records.SPLITS:
        counts = manifest["splits"][split]
        assert (counts["questions"], counts["images"]) == (109, 75)
        assert counts["answer_types"] == {"yes/no": 36, "number": 37, "other": 36}
    for image in records.iter_images(tmp_path / "records"):
        assert image.data == (shared_data / "vqav2-sample" / "images" / image.file_name).read_bytes()
        assert open_image(image.data, image.file_name, params.max_image_pixels).mode == "RGB"
    assert len(list(records.iter_images(tmp_path / "records"))) == 75


def test_a_link_that_leads_to_itself_is_no_picture(vqav2_folder, directory_params, tmp_path):
    folder = vqav2_folder()
    (folder / "train2014/loop.jpg").symlink_to("loop.jpg")
    assert fetch(directory_params(folder), tmp_path / "records")["images"] == 6
    (folder / IMAGE).unlink()
    (folder / IMAGE).symlink_to(Path(IMAGE).name)
    with pytest.raises(UserError, match=rf"Too many levels of symbolic links: .*{Path(IMAGE).name}"):
        fetch(directory_params(folder), tmp_path / "records")
