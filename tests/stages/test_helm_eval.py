"""The stage's own work: one clear message and exit code 2 when something is missing. What it computes is tested in
tests/evaluation."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_stage(folder):
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, ROOT / "stages" / "helm_eval.py"], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
def test_missing_records_end_the_stage_with_one_message(tmp_path):
    shutil.copy(ROOT / "presets/small.yaml", tmp_path / "params.yaml")
    shutil.copytree(ROOT / "evaluation" / "helm" / "nltk_data", tmp_path / "evaluation" / "helm" / "nltk_data")
    done = run_stage(tmp_path)
    assert done.returncode == 2, done.stderr
    assert "helm-eval: error: data/records/manifest.json: cannot be read" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "reports").exists()
