"""The launch that was asked for is the launch that runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vlm_vqa.errors import UserError
from vlm_vqa.training import launch

ROOT = Path(__file__).parents[2]


def test_an_unknown_launch_names_the_known_ones():
    with pytest.raises(UserError, match="'gpu'.*Known launches: cpu, fsdp2"):
        launch.read_launch("gpu", ROOT / "launch")


def test_several_processes_are_refused():
    with pytest.raises(UserError, match="fsdp2.*4 processes"):
        launch.start("fsdp2", ROOT / "launch")


START = "from vlm_vqa.training import launch; print(launch.start('{name}', '{folder}'))"


def start(name, folder):
    return subprocess.run(
        [sys.executable, "-c", START.format(name=name, folder=folder)], capture_output=True, text=True, timeout=120,
        cwd=ROOT, env={**os.environ, "PYTHONPATH": "src"},
    )  # fmt: skip


def test_what_starts_is_compared_with_what_was_asked(tmp_path):
    done = start("cpu", ROOT / "launch")
    assert "'distributed_type': 'NO', 'num_processes': 1, 'device': 'cpu'" in done.stdout, done.stderr
    asked = yaml.safe_load((ROOT / "launch/cpu.yaml").read_text())
    (tmp_path / "odd.yaml").write_text(yaml.safe_dump({**asked, "distributed_type": "FSDP"}))
    assert "asks for distributed_type FSDP, but NO started" in start("odd", tmp_path).stderr
