"""Distributed training is the same training: `proofs.strategies` on the real sample, and what it would notice."""

import json
import os
import subprocess
import sys

import pytest

from proofs.project import ROOT, Project, sample_params
from proofs.strategies import CASES, claims, table

# With rates and a phase, which end in training all alike: what the cases without them show is among it.
PHASED = "rates and projector phase"
CHOSEN = [
    "shared rows",
    f"{PHASED}, 4 passes",
    f"{PHASED}, 8 bits",
    f"{PHASED}, 8 bits, clipped",
    "shared rows, adapters",
    "one process misled",
]


def test_a_claim_is_about_the_worst_launch():
    found = {"shared rows": {"a": {"weights": 1e-6, "loss": 1e-7}, "b": {"weights": 1e-3, "loss": 1e-3}},
             "shared rows, 8 bits": {"a": {"weights": 0.2, "loss": 0.1}}}  # fmt: skip
    made = claims(found, {"shared rows, 8 bits": 0.1})
    assert [(claim.ratio, claim.met) for claim in made] == [(1e-3, False), (2.0, False), (1e-3, False)]
    assert "| shared rows | 1.0e-06 | 1.0e-03 |  |" in table(found, {"shared rows, 8 bits": 0.1}, ["a", "b"])


def test_zero_is_not_asked_to_clip():
    clipped = next(case for case in CASES if case.percentile_clipping != 100)
    assert clipped.runs_under("cpu-fsdp2") and not clipped.runs_under("cpu-zero3")


@pytest.mark.slow
def test_every_launch_trains_as_one_process_does(tmp_path, shared_data):
    sizes = {"language.config.hidden_size": 64, "language.config.intermediate_size": 128}
    project = Project(tmp_path / "project", {**sample_params(shared_data), **sizes})
    for name in ("fetch-vqav2", "extract-features"):
        done = project.stage(name)
        assert done.returncode == 0, done.stderr
    results = tmp_path / "results"
    done = subprocess.run(
        [sys.executable, "-m", "proofs.strategies", "--steps", "20", "--results", str(results), "--cases", *CHOSEN],
        cwd=project.folder, capture_output=True, text=True, timeout=800,
        env=project.environment(PYTHONPATH=os.pathsep.join([str(ROOT / "src"), str(ROOT)])),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((results / "strategies.json").read_text())
    # Among them: one process that reads other images is far off.
    assert len(result["claims"]) == len(CHOSEN) + 1 and all(claim["met"] for claim in result["claims"]), done.stdout
    assert set(result["details"]["distances"][CHOSEN[1]]) == {
        "cpu-ddp", "cpu-fsdp2", "cpu-fsdp2-uneven", "cpu-zero2", "cpu-zero3",
    }  # fmt: skip
    assert result["details"]["losses"] >= 20
    states = result["details"]["states"]
    assert all("uint8" in kinds for name, kinds in states[CHOSEN[2]].items()), states
    learning_trains_on_it(project)


def learning_trains_on_it(project):
    """The proof of learning, of which one training is too short to compare anything, runs on the same two stages."""
    script = (
        "from proofs.learning import *; few = {'train.num_train_epochs': 1, 'train.questions_per_row': 1}; "
        "print(train_and_score(changed(load_params(), few))['questions'])"
    )
    done = project.command(f'python -c "{script}"', PYTHONPATH=os.pathsep.join([str(ROOT / "src"), str(ROOT)]))
    assert done.returncode == 0 and done.stdout.split()[-1] == "109", done.stderr[-3000:]
