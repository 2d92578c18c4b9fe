"""Tiny records and a model made of paper: red and blue pictures, and an predictor that looks at their colour."""

import io
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.sealing import seal_records
from vlm_vqa.data.decoding import open_image
from vlm_vqa.data.feature_store import Layout
from vlm_vqa.data.records import IMAGE_FEATURES, QUESTION_FEATURES, iter_images
from vlm_vqa.features.writer import FeatureStoreWriter, Shard
from vlm_vqa.params import HELM_INSTRUCTION, StoreDtype

ROOT = Path(__file__).parents[2]

MARKUP = 'is <b>it</b> red & "so"? ![](http://127.0.0.1:9/a.png) <img src="http://127.0.0.1:9/b.png">'
"""A question that a web page must show as it is, and not as the page's own parts."""

FAKE_PREDICTOR = f'''
import json
import os
from pathlib import Path

import numpy as np

from vlm_vqa.errors import UserError
from vlm_vqa.inference.predictor import Candidate


class Fake:
    """Answers "red" or "blue" by the pixels; `model.json` in its folder can change what it does."""

    def __init__(self, folder):
        facts = json.loads((Path(folder) / "model.json").read_text())
        self.weights_hash = facts.get("weights_hash", "w" * 64)
        self.mask = "image-prefix"
        self.selection = dict(step=facts.get("step"), step_is=facts.get("step_is"), selected_on=facts.get("selected_on"))
        self.instruction = facts.get("instruction", {HELM_INSTRUCTION!r})
        self.red = facts.get("red", "red")
        self.fails = facts.get("fails")
        self.encoded = self.loads = 0

    def encode(self, images):
        self.encoded += len(images)
        return np.array([np.asarray(image, dtype=np.float32).mean((0, 1)) for image in images])

    def answer_features(self, questions, features, images=None):
        if self.fails:
            raise RuntimeError(self.fails)
        features = np.asarray(features, dtype=np.float32).reshape(len(features), -1)
        features = features[list(range(len(questions)) if images is None else images)]
        return [Candidate(self.red if row[0] > row[2] else "blue", float(row.max()) / 255) for row in features]


def load(folder, max_new_tokens=10):
    if not (Path(folder) / "model.json").exists():
        raise UserError(f"{{folder}}: no export there.")
    return Fake(folder)
'''


def _picture(red: bool) -> bytes:
    """A JPEG of 16 x 16 pixels."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (220, 10, 10) if red else (10, 10, 220)).save(file, "JPEG")
    return file.getvalue()


def question_rows(images: int, first_id: int) -> list[dict]:
    """Two questions an image, even images are red; the second question's humans do not agree."""
    rows = []
    for image in range(images):
        colour = "red" if image % 2 == 0 else "blue"
        for number, (kind, question) in enumerate((("other", "what colour?"), ("yes/no", MARKUP))):
            answer = colour if kind == "other" else ("yes" if colour == "red" else "no")
            answers = [answer] * 10 if number == 0 else [answer] * 6 + [colour] * 4
            rows.append(
                {
                    "question_id": first_id + 10 * image + number,
                    "image_id": first_id + image,
                    "question": question,
                    "question_type": question.split()[0],
                    "answer_type": kind,
                    "multiple_choice_answer": answer,
                    "answers": answers,
                    "answer_confidences": ["yes"] * 10,
                    "original_question_id": None,
                    "original_image_id": None,
                }
            )
    return rows


@pytest.fixture
def picture():
    return _picture


@pytest.fixture
def records(tmp_path) -> Path:
    """`data/records` with 4 training and 8 validation images."""
    folder = tmp_path / "data" / "records"
    folder.mkdir(parents=True)
    for split, images, first in (("train", 4, 100), ("val", 8, 500)):
        questions = datasets.Dataset.from_list(question_rows(images, first), features=QUESTION_FEATURES)
        questions.to_parquet(folder / f"questions-{split}.parquet")
    ids = [(100 + image, image % 2 == 0) for image in range(4)] + [(500 + image, image % 2 == 0) for image in range(8)]
    rows = [
        {"image_id": image_id, "file_name": f"{image_id}.jpg", "width": 16, "height": 16, "sha256": "",
         "image": {"bytes": _picture(red), "path": None}}
        for image_id, red in ids
    ]  # fmt: skip
    datasets.Dataset.from_list(rows, features=IMAGE_FEATURES).to_parquet(folder / "images-00000-of-00001.parquet")
    seal_records(folder, data_hash="d", splits={"val": {"answers_per_question": {"10": 16}}})
    return folder


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A working directory with this project's HELM files, whose deployment loads the fake predictor."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "fake_predictor.py").write_text(FAKE_PREDICTOR)
    (tmp_path / "models" / "export").mkdir(parents=True)
    (tmp_path / "models" / "export" / "model.json").write_text("{}")
    shutil.copy(ROOT / "presets/small.yaml", tmp_path / "params.yaml")
    config = tmp_path / "evaluation" / "helm"
    config.mkdir(parents=True)
    for name in ("model_metadata.yaml", "run_entries.conf", "schema.yaml"):
        shutil.copy(ROOT / "evaluation" / "helm" / name, config)
    shutil.copytree(ROOT / "evaluation" / "helm" / "nltk_data", config / "nltk_data")
    deployments = yaml.safe_load((ROOT / "evaluation" / "helm" / "model_deployments.yaml").read_text())
    deployments["model_deployments"][0]["client_spec"]["args"]["predictor"] = "fake_predictor:load"
    (config / "model_deployments.yaml").write_text(yaml.safe_dump(deployments))
    return tmp_path


@pytest.fixture
def features(records) -> Path:
    """`data/features` that the fake predictor reads: an image's mean colour, as one token of width 3."""
    folder = records.parent / "features"
    layout = Layout(images=12, num_tokens=1, width=3, dtype=StoreDtype.FLOAT32)
    writer = FeatureStoreWriter(folder, layout, {"encoder_hash": "e", "data_hash": "d"})
    assert writer.begin() == [0]
    shard = Shard(layout, 0)
    for record in iter_images(records):
        pixels = np.asarray(open_image(record.data, record.file_name, 10_000), dtype=np.float32)
        shard.add([record.image_id], torch.tensor(pixels.mean((0, 1)))[None, None])
    writer.write(shard)
    writer.publish()
    return folder
