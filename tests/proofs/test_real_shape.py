"""The proof of the real shape without its training: what is set, what a process holds, what becomes of figures."""

import os
import subprocess
import sys
from functools import partial

import psutil
import pytest
import yaml

from proofs import real_shape
from proofs.tree import Call
from vlm_vqa.errors import UserError
from vlm_vqa.hashing import write_json
from vlm_vqa.params import load_params

GIB = 2**30
HOLDS = """
import sys, torch
from safetensors.torch import load_file, save_file
save_file({"weights": torch.ones(25 << 20)}, sys.argv[1])
read, own = load_file(sys.argv[1]), torch.ones(10 << 20)
assert read["weights"].sum() > 0
print("there", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_it_trains_the_preset_for_two_steps(tmp_path, processes):
    data = yaml.safe_load((real_shape.ROOT / "presets/small.yaml").read_text())["data"]
    write_json(tmp_path / "data.json", data)
    preset = load_params(real_shape.PRESET)
    train = real_shape.settings(preset, tmp_path, processes, short=False).train
    assert train.batch_size * processes == real_shape.QUESTIONS and train.gradient_accumulation_steps == 1
    assert train.num_train_epochs == 2 < train.save_steps
    for same in ("optimizer", "weights_dtype", "rounding", "freeze_embeddings", "gradient_checkpointing"):
        assert getattr(train, same) == getattr(preset.train, same)
    short = real_shape.settings(preset, tmp_path, processes, short=True)
    assert (short.train, short.vision.num_patches, short.prompt) == (train, 5, preset.prompt)


def test_files_of_weights_count_where_they_are_asked_for(tmp_path):
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "model.safetensors")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "there\n"
        own, mapped = (real_shape.resident(psutil.Process(process.pid), also) for also in (False, True))
        process.communicate()
    assert mapped - own == pytest.approx(100 << 20, rel=0.01) and own > 40 << 20


def test_the_most_until_something_is_so(tmp_path):
    call = partial(Call, folder=tmp_path, environment=dict(os.environ), output=tmp_path / "said")
    with call("echo first; sleep 0.5; echo second; sleep 60") as one:
        counts = iter(range(10_000))
        most = one.most(lambda _: next(counts), lambda: "second" in one.text(), 30)
    assert 0 < most < 10_000 and not one.processes()
    with call("echo broken >&2; exit 3") as one, pytest.raises(UserError, match="did not come so far:\nbroken"):
        one.most(lambda _: 1, lambda: False, 30)
    with call("exec sleep 60") as one, pytest.raises(UserError, match="did not come so far"):
        one.most(lambda _: 1, lambda: False, 0.1)


def test_what_was_measured_is_held_to_preflight_and_to_the_weights():
    predicted = dict(zip(real_shape.MOMENTS, (10 * GIB, 20 * GIB, 10 * GIB, 10 * GIB, 10 * GIB), strict=True))
    files = dict(zip(real_shape.WEIGHTS, (9 * GIB, 9 * GIB, 0.1 * GIB), strict=True))
    found = {"peaks": {**predicted, "training": 21 * GIB}, "predicted": predicted, "files": files}
    claims = {claim.what: claim for claim in real_shape.claims_of(2, 1, found)}
    assert len(claims) == 9 and all(claim.met for claim in claims.values())
    assert claims["2 layers, 1 process: memory off preflight's, training"].ratio == pytest.approx(0.05)
    assert claims["2 layers, 1 process: memory over the weights, export"].ratio == pytest.approx(8.8 / 9)
    two = {claim.what: claim for claim in real_shape.claims_of(2, 2, found)}
    assert two["2 layers, 2 processes: memory over the weights, start"].ratio == pytest.approx(7.6 / 9)
    assert two["2 layers, 2 processes: memory over the weights, export"].ratio == pytest.approx(8.8 / 9)
    worse = {**found, "peaks": {**predicted, "training": 17 * GIB, "whole weights": 13 * GIB}}
    missed = [claim.what.partition(": ")[2] for claim in real_shape.claims_of(2, 1, worse) if not claim.met]
    off, over = "memory off preflight's", "memory over the weights"
    assert missed == [f"{off}, training", f"{off}, whole weights", f"{over}, whole weights"]
