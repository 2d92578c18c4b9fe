"""The train stage as it is launched: what it writes, what it refuses, and how it goes on after a signal."""

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import PaliGemmaForConditionalGeneration

from proofs.project import clear, outcome
from tests.training_run import Training, step_of
from vlm_vqa.cli import main
from vlm_vqa.model.adapters import merge_adapter
from vlm_vqa.model.encoder import load_encoder
from vlm_vqa.model.vlm import initial_model, trained_state
from vlm_vqa.params import load_params
from vlm_vqa.sealed import read_sealed, write_sealed
from vlm_vqa.training.prepare import prepare

pytestmark = pytest.mark.slow


def train(project):
    """Train to the end and return what was printed."""
    with Training(project) as training:
        training.finish()
        return training.text()


def test_terminated_and_run_again_it_ends_as_if_never_stopped(prepared):
    train(prepared)
    undisturbed = outcome(prepared)
    report = json.loads((prepared.folder / "reports/train.json").read_text())
    assert report["questions"] == 109 and report["steps"] == 14
    assert report["last_logged_loss"] < report["first_logged_loss"]

    clear(prepared)
    with Training(prepared) as training:
        training.wait_for(training.whole, "a checkpoint was whole")
        os.killpg(training.launcher.pid, signal.SIGTERM)
        training.end()
    newest = training.whole()[0]
    assert f"going on from {newest.relative_to(prepared.folder)}\n" in train(prepared)
    assert outcome(prepared) == undisturbed
    assert not list(prepared.folder.glob("checkpoints/*/*"))


def test_features_of_another_encoder_are_refused(prepared):
    manifest = prepared.folder / "data/features/manifest.json"
    text = manifest.read_text()
    try:
        write_sealed(manifest, {**read_sealed(manifest, "a manifest", ""), "encoder_hash": "0" * 64})
        done = prepared.stage("train")
        assert done.returncode != 0
        assert (
            "encoder_hash" in done.stderr and "extract-features" in done.stderr and "Traceback (most" not in done.stderr
        )
    finally:
        manifest.write_text(text)


# --- several processes: proofs/kills.py does the same at random, through `dvc repro` ----------------------------------


@pytest.fixture
def project(prepared):
    """The prepared project without traces of other tests, on which parameters may be set."""
    path = prepared.folder / "params.yaml"
    text = path.read_text()
    clear(prepared)
    yield prepared
    path.write_text(text)


def test_a_rank_killed_in_mid_run_ends_all_and_costs_nothing(project):
    project.set({
        "train.launch": "cpu-fsdp2", "train.batch_size": 4, "train.optimizer": "adamw_bnb_8bit",
        "train.percentile_clipping": 95, "train.dropout": 0.1, "train.logging_steps": 3, "train.save_steps": 5,
        "validation.questions": 20, "validation.train_questions": 10, "validation.every_steps": 3, "validation.keep": "best",
        "train.num_train_epochs": 3, "train.projector_steps": 11, "train.projector_learning_rate": 9e-3,
    })  # fmt: skip
    train(project)
    undisturbed = outcome(project)
    written = {
        "models/trained/training.json",
        "reports/train.json",
        "reports/train_curve.csv",
        "reports/validation/curve.csv",
    }
    assert written <= undisturbed.keys()
    clear(project)
    with Training(project) as training:
        training.wait_for(lambda: (training.step() or 0) >= 12, "step 12")
        training.kill(rank=1)
    newest = training.whole()[0]
    assert f"going on from {newest.relative_to(project.folder)}\n" in train(project)
    assert outcome(project) == undisturbed


def test_killed_in_mid_checkpoint_it_goes_on_from_the_one_before_and_as_one_process_too(project, monkeypatch):
    """With adapters: they, too, end as if nothing had happened, and merging them into the base gives the result."""
    lora = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": ["q_proj", "down_proj"]}
    project.set({"train.launch": "cpu-ddp", "train.batch_size": 4, "train.save_steps": 5, "train.lora": lora,
                 "train.freeze_embeddings": True})  # fmt: skip
    train(project)
    undisturbed = outcome(project)
    by_two = weights(project)
    clear(project)
    with Training(project) as training:
        torn = training.freeze_in_checkpoint(step=10, rank=0)
        training.kill(rank=0)
    before = training.whole()[0]
    assert torn in training.torn() and step_of(before) < step_of(torn)
    shutil.copytree(project.folder / "checkpoints", project.folder / "kept")
    text = train(project)
    assert f"{torn.relative_to(project.folder)} was cut off" in text
    assert f"going on from {before.relative_to(project.folder)}\n" in text
    assert outcome(project) == undisturbed

    clear(project)
    shutil.move(project.folder / "kept", project.folder / "checkpoints")
    project.set({"train.launch": "cpu", "train.batch_size": 8})
    assert f"going on from {before.relative_to(project.folder)}\n" in train(project)
    monkeypatch.chdir(project.folder)
    start = initial_weights()
    assert (weights(project) - by_two).norm() < 1e-4 * (by_two - start).norm()
    assert main(["base", "base"]) == 0
    base = PaliGemmaForConditionalGeneration.from_pretrained("base", attn_implementation="eager")
    assert torch.equal(flat(trained_state(base)), start)
    merge_adapter(base, "models/trained/adapter", "base")
    torch.testing.assert_close(flat(trained_state(base)), weights(project), rtol=0, atol=1e-7)


def weights(project):
    return flat(load_file(project.folder / "models/trained/model.safetensors"))


def initial_weights():
    """Return what a training in the working directory begins with."""
    params = load_params()
    encoder = load_encoder(params.vision, device="cpu")
    _, _, processor = prepare(params, encoder)
    return flat(trained_state(initial_model(params.language, encoder.model.config, processor, params.seed)))


def flat(state):
    return torch.cat([value.flatten() for _, value in sorted(state.items())])
