"""Starting from a whole checkpoint, through all stages: a PaliGemma as the hub has it, and then what came out of that."""

import csv
import json
import shutil

import pytest

from proofs.project import Project, sample_params
from tests.tiny_model import save_paligemma
from vlm_vqa.params import HELM_INSTRUCTION

pytestmark = pytest.mark.slow
STAGES = ("fetch-vqav2", "extract-features", "train", "export", "helm-eval")


def run(project, *names):
    for name in names:
        done = project.stage(name, MLFLOW_TRACKING_URI="sqlite:///mlflow.db")
        assert done.returncode == 0, f"{name}: {done.stderr[-3000:]}"


def validations(project):
    with (project.folder / "reports/validation/curve.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_paligemma_is_fine_tuned_and_what_comes_out_is_fine_tuned_again(tmp_path, shared_data):
    texts = [HELM_INSTRUCTION, *(f"What color is the {thing}?" for thing in ("cat", "bus", "sky"))]
    save_paligemma(tmp_path / "paligemma", texts, vocabulary=500)
    changes = {
        "model": {"start": "checkpoint", "checkpoint": str(tmp_path / "paligemma"), "revision": None, "adapter": None},
        "vision.model": "checkpoint", "vision.num_patches": 4, "vision.visual_embed_dim": 24,
        "language": {"model": "checkpoint", "revision": None, "vocab_size": None, "config": None},
        "prompt.text_length": 160, "train.learning_rate": 1e-3, "train.num_train_epochs": 1,
        "validation.from": "val", "validation.questions": 20,
    }  # fmt: skip
    (tmp_path / "project").mkdir()
    project = Project(tmp_path / "project", sample_params(shared_data) | changes)
    run(project, *STAGES)
    first = validations(project)
    assert float(first[-1]["validation_loss"]) < float(first[0]["validation_loss"])
    card = (project.folder / "models/export/README.md").read_text()
    assert "SigLIP (of `/" in card and "DINOv2" not in card
    training = json.loads((project.folder / "models/trained/training.json").read_text())
    assert len(training["start_hash"]) == 64

    # Its tower is the same, whatever it was read from: the features are those of the first time, or train would refuse them.
    shutil.copytree(project.folder / "models/export", project.folder / "starts/first")
    project.set({"model.checkpoint": "starts/first"})
    run(project, "train")
    second = validations(project)
    for name in ("validation_loss", "validation_score", "validation_blind_score"):
        assert float(second[0][name]) == pytest.approx(float(first[-1][name]), abs=1e-6)
    assert second[-1]["validation_loss"] != second[0]["validation_loss"]
