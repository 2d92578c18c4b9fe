"""The stage extract-features: stored features are the live encoder's, and a run that did not finish leaves no store.

`live` is the plain way to the features: one image after another, on one thread.
"""

import csv
import io
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from stages import extract_features
from vlm_vqa.data import records
from vlm_vqa.data.feature_store import FeatureStore
from vlm_vqa.errors import UserError
from vlm_vqa.model import extraction
from vlm_vqa.model.encoder import load_encoder
from vlm_vqa.params import load_params

REPOSITORY = Path(__file__).parents[2]
SHARED_DATA = Path(os.environ.get("VLM_VQA_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
BATCH = 4


def as_jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG")
    return file.getvalue()


def write_records(images: dict[int, bytes]) -> None:
    """The part of `data/records` that this stage reads, in the format of `vlm_vqa.data.records`."""
    folder = Path("data/records")
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for image_id, data in sorted(images.items()):
        row = {"image_id": image_id, "file_name": f"{image_id}.jpg", "width": 1, "height": 1, "sha256": ""}
        rows.append({**row, "image": {"bytes": data, "path": None}})
    table = datasets.Dataset.from_list(rows, features=records.IMAGE_FEATURES).data.table
    pq.write_table(table, folder / "images-00000-of-00001.parquet", row_group_size=3)
    manifest = {"schema_version": records.SCHEMA_VERSION, "data_hash": "d" * 64}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """A working directory with the small preset's params and batches of four images."""
    params = yaml.safe_load((REPOSITORY / "presets" / "small.yaml").read_text())
    params["vision"]["batch_size"] = BATCH
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def set_vision(folder: Path, **values: object) -> None:
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["vision"].update(values)
    (folder / "params.yaml").write_text(yaml.safe_dump(params))


def noise(count: int) -> dict[int, bytes]:
    generator = np.random.default_rng(0)
    sizes = [(17, 90), (64, 64), (101, 33)]
    images = {}
    for number in range(count):
        pixels = generator.integers(0, 256, (*sizes[number % 3], 3), dtype=np.uint8)
        images[10 * number + 1] = as_jpeg(Image.fromarray(pixels))
    return images


def live(images: dict[int, bytes]) -> torch.Tensor:
    encoder = load_encoder(load_params("params.yaml").vision, "cpu")
    opened = [records.open_image(data, str(image_id), 10**8) for image_id, data in sorted(images.items())]
    return torch.cat([encoder.encode(opened[start : start + BATCH]) for start in range(0, len(opened), BATCH)])


@pytest.fixture
def three_threads(monkeypatch):
    """Three decoding threads, whatever the machine has."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)


def encoder_that(preprocess: Callable[[list[Image.Image]], torch.Tensor]) -> SimpleNamespace:
    return SimpleNamespace(preprocess=preprocess)


def first_pixels(images: list[Image.Image]) -> torch.Tensor:
    return torch.tensor([image.getpixel((0, 0))[0] for image in images])


def shades(count: int) -> Iterator[records.ImageRecord]:
    """Images whose every pixel is their id."""
    for shade in range(count):
        file = io.BytesIO()
        Image.new("RGB", (4, 4), (shade,) * 3).save(file, "PNG")
        yield records.ImageRecord(shade, f"{shade}.png", file.getvalue())


def decoding_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_stored_features_are_the_live_encoders_bit_for_bit(run_folder, three_threads):
    images = noise(10)
    write_records(images)
    extract_features.main()
    store = FeatureStore.open("data/features")
    assert torch.equal(store.batch(sorted(images)), live(images))
    encoder = load_encoder(load_params("params.yaml").vision, "cpu")
    expected = {"encoder_hash": encoder.hash, "data_hash": "d" * 64, "dtype": "float32", "num_tokens": 65, "width": 128}
    FeatureStore.open("data/features", expected)
    assert store.manifest["processor"]["image_processor_type"] == "BitImageProcessor"
    assert store.manifest["processor"]["backend"] == "torchvision"

    before = {path.name: path.read_bytes() for path in Path("data/features").iterdir()}
    extract_features.main()
    assert before == {path.name: path.read_bytes() for path in Path("data/features").iterdir()}


def test_store_dtype_rounds_the_live_features(run_folder):
    set_vision(run_folder, store_dtype="bfloat16")
    images = noise(3)
    write_records(images)
    extract_features.main()
    store = FeatureStore.open("data/features", {"dtype": "bfloat16"})
    assert torch.equal(store.batch(sorted(images)), live(images).to(torch.bfloat16))


def test_real_photographs_become_features(run_folder):
    sample = SHARED_DATA / "vqav2-sample"
    if not sample.is_dir():
        pytest.skip(f"no VQAv2 sample in {sample}; set VLM_VQA_SHARED_DATA")
    with open(sample / "images.csv", newline="") as file:
        images = {int(row["image_id"]): (sample / row["file"]).read_bytes() for row in csv.DictReader(file)}
    assert len(images) == 75
    # COCO has greyscale files, this sample of it has none.
    images[1] = as_jpeg(Image.open(io.BytesIO(next(iter(images.values())))).convert("L"))
    write_records(images)
    extract_features.main()
    store = FeatureStore.open("data/features")
    assert len(store) == len(images) == 76
    assert torch.equal(store.batch(sorted(images)), live(images))


def test_a_bad_image_is_named_and_leaves_no_store(run_folder):
    images = noise(9)
    images[81] = images[81][: len(images[81]) // 2]
    write_records(images)
    with pytest.raises(UserError, match="81.jpg"):
        extract_features.main()
    with pytest.raises(UserError, match="data/features.*missing or unfinished"):
        FeatureStore.open("data/features")


def test_batches_come_in_order_when_later_ones_are_ready_first(three_threads):
    second_is_ready = threading.Event()

    def preprocess(images: list[Image.Image]) -> torch.Tensor:
        pixels = first_pixels(images)
        if pixels[0] == 0:
            assert second_is_ready.wait(10), "nothing is decoded beside the first batch"
        second_is_ready.set()
        return pixels

    batches = list(extraction.preprocessed(shades(10), encoder_that(preprocess), BATCH, 100))
    assert [image_ids for image_ids, _ in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert all(image_ids == pixels.tolist() for image_ids, pixels in batches)
    assert not decoding_threads()


def test_the_next_batches_are_decoded_while_one_is_looked_at_and_no_more(three_threads):
    taken, decoded = [], threading.Semaphore(0)

    def stream() -> Iterator[records.ImageRecord]:
        for record in shades(200):
            taken.append(record.image_id)
            yield record

    def preprocess(images: list[Image.Image]) -> torch.Tensor:
        decoded.release()
        return first_pixels(images)

    with closing(extraction.preprocessed(stream(), encoder_that(preprocess), BATCH, 100)) as batches:
        for number, _ in enumerate(batches, 1):
            # This batch, and as many as there are threads.
            assert len(taken) == min(200, (number + 3) * BATCH)
            if number == 1:
                assert all(decoded.acquire(timeout=10) for _ in range(4)), "nothing is decoded ahead"


def test_threads_end_when_the_work_is_left_early(three_threads):
    with pytest.raises(KeyboardInterrupt):
        with closing(extraction.preprocessed(shades(200), encoder_that(first_pixels), BATCH, 100)) as batches:
            next(batches)
            assert decoding_threads()
            raise KeyboardInterrupt
    assert not decoding_threads()


@pytest.mark.parametrize("position", [0, 5, 37, 39])
def test_a_bad_image_is_named_in_its_turn_and_the_threads_end(three_threads, position):
    images = list(shades(40))
    images[position] = images[position]._replace(data=b"no image")
    seen = []
    with pytest.raises(UserError, match=f"^{position}.png: not a readable image"):
        for image_ids, _ in extraction.preprocessed(images, encoder_that(first_pixels), BATCH, 100):
            seen += image_ids
    assert seen == list(range(position // BATCH * BATCH))
    assert not decoding_threads()


def test_decoding_threads_take_one_core_and_leave_the_encoder_its_own():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    found = []

    def preprocess(images: list[Image.Image]) -> torch.Tensor:
        found.append(torch.get_num_threads())
        return first_pixels(images)

    try:
        list(extraction.preprocessed(shades(8), encoder_that(preprocess), BATCH, 100))
        assert found == [1, 1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_missing_records_are_named(run_folder):
    with pytest.raises(UserError, match="data/records/manifest.json"):
        extract_features.main()
