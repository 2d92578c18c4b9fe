"""Set-up and the scripts of `.ci/`: what was asked for is installed, what is committed together belongs together."""

import copy
import importlib.util
import os
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]

LOCK = {
    "stages": {
        "train": {
            "deps": [{"path": "src/a.py", "md5": "1"}],
            "outs": [{"path": "models/trained", "md5": "2"}, {"path": "reports/train.json", "md5": "3"}],
        },
        "export": {"deps": [{"path": "models/trained", "md5": "2"}], "outs": [{"path": "models/export", "md5": "4"}]},
    }
}
# As `dvc status --json` words a checkout of git alone, to which nothing was pulled.
CLEAN = {
    "train": [{"changed outs": {"models/trained": "not in cache"}}],
    "export": [{"changed deps": {"models/trained": "deleted"}}, {"changed outs": {"models/export": "not in cache"}}],
}


@pytest.fixture(scope="module")
def current():
    spec = importlib.util.spec_from_file_location("current", ROOT / ".ci/current.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_git_alone_does_not_hold_is_not_stale(current):
    committed = current.in_git(yaml.safe_load((ROOT / "dvc.yaml").read_text()))
    assert {"reports/train_curve.csv", "reports/metrics.json", "reports/evaluation.json"} <= committed
    assert not committed & {"data/records", "data/features", "models/trained", "models/export"}
    assert list(current.stale(CLEAN, LOCK, committed)) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"changed deps": {"params.yaml": {"train": "modified"}}}, "params.yaml"),
        ({"changed deps": {"src/a.py": "modified"}}, "src/a.py"),
        ({"changed outs": {"reports/train.json": "modified"}}, "reports/train.json"),
        ({"changed outs": {"reports/train.json": "deleted"}}, "reports/train.json"),
        ("changed command", "changed command"),
    ],
)
def test_a_change_without_its_run_is_stale(current, change, words):
    lines = list(current.stale(CLEAN | {"train": [*CLEAN["train"], change]}, LOCK, {"reports/train.json"}))
    assert len(lines) == 1 and words in lines[0] and lines[0].startswith("train: ")


def test_a_lock_put_together_from_two_runs_is_stale(current):
    lock = copy.deepcopy(LOCK)
    lock["stages"]["export"]["deps"][0]["md5"] = "of another training"
    assert list(current.stale(CLEAN, lock, set())) == [
        "export: read another models/trained than the one that dvc.lock says was made"
    ]


@pytest.mark.parametrize(
    ("variables", "there", "absent"),
    [
        ("", "-m pip install", "download.pytorch.org"),
        ("WHEELS=cpu", "--extra-index-url https://download.pytorch.org/whl/cpu", "uv pip"),
        ("INSTALLER=uv", "uv pip install --python", "--torch-backend"),
        ("INSTALLER=uv WHEELS=cpu", "--torch-backend cpu", "-m pip install"),
    ],
)
def test_setup_installs_the_wheels_that_were_asked_for(tmp_path, variables, there, absent):
    command = ["make", "--dry-run", f"VENV={tmp_path}", *variables.split(), "setup"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"MAKEFLAGS": ""}, capture_output=True, text=True, check=True
    )
    assert there in done.stdout and absent not in done.stdout


def test_an_environment_of_other_wheels_is_named(tmp_path):
    (tmp_path / ".ready").write_text("cuda\n")
    command = ["make", f"VENV={tmp_path}", "WHEELS=cpu", "setup"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"MAKEFLAGS": ""}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "has the wheels for cuda, not for cpu: remove it" in done.stderr
