"""All stages after the first with `vision.store: false`, as they are launched, beside the same with stored features."""

import json

import pytest
import torch
from safetensors.torch import load_file

from proofs.project import clear

pytestmark = pytest.mark.slow


def run(project, *names):
    for name in names:
        done = project.stage(name)
        assert done.returncode == 0, done.stderr
    return done.stderr


def trained(project):
    state = load_file(project.folder / "models/trained/model.safetensors")
    return torch.cat([state[name].flatten() for name in sorted(state)])


def test_every_stage_looks_at_the_pictures_itself_and_trains_the_same_weights(prepared):
    features = prepared.folder / "data/features"
    prepared.set({"train.dataloader_workers": 1, "train.max_grad_norm": 1.0})
    run(prepared, "train")
    report, stored = json.loads((prepared.folder / "reports/train.json").read_text()), trained(prepared)
    clear(prepared)
    prepared.set({"vision.store": False})
    refused = prepared.stage("train")
    assert refused.returncode and "vision.store" in refused.stderr and "extract-features" in refused.stderr

    assert "vision.store is false" in run(prepared, "extract-features")
    assert [path.name for path in features.iterdir()] == ["manifest.json"]
    run(prepared, "train")
    live = json.loads((prepared.folder / "reports/train.json").read_text())
    assert live["first_logged_loss"] == pytest.approx(report["first_logged_loss"], rel=1e-5)
    assert live["last_logged_loss"] == pytest.approx(report["last_logged_loss"], rel=1e-3)
    assert (trained(prepared) - stored).norm() < 1e-3 * stored.norm()
    run(prepared, "export")
    run(prepared, "helm-eval")
    assert json.loads((prepared.folder / "reports/evaluation.json").read_text())["helm_equals_stored_features"] == 1.0
