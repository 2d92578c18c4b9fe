"""The stage extract-features: stored features are the live encoder's, and a run that did not finish leaves no store."""

import csv
import io
import json
import os
from pathlib import Path

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


def test_stored_features_are_the_live_encoders_bit_for_bit(run_folder):
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


def test_missing_records_are_named(run_folder):
    with pytest.raises(UserError, match="data/records/manifest.json"):
        extract_features.main()
