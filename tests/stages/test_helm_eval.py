"""The stage's own work: one clear message and exit code 2 when something is missing, and the same bytes for any number of
processes and however often it was killed. What it computes is tested in tests/evaluation."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests.evaluation.conftest import features, project, records  # noqa: F401 - fixtures

ROOT = Path(__file__).parents[2]


def run_stage(folder):
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, ROOT / "stages" / "helm_eval.py"], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
def test_missing_records_end_the_stage_with_one_message(tmp_path):
    shutil.copy(ROOT / "presets/small.yaml", tmp_path / "params.yaml")
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    shutil.copytree(ROOT / "evaluation" / "helm" / "nltk_data", tmp_path / "evaluation" / "helm" / "nltk_data")
    done = run_stage(tmp_path)
    assert done.returncode == 2, done.stderr
    assert "helm-eval: error: data/records/manifest.json: cannot be read" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "reports").exists()


LAUNCHED = """
import sys
import vlm_vqa
from vlm_vqa import workers
from vlm_vqa.evaluation.evaluate import evaluate, take_part
from vlm_vqa.params import load_params
from vlm_vqa.pipeline import entrypoint
sys.path.insert(0, ".")
import fake_predictor


def main():
    params = load_params()
    running = workers.join(workers.named(params.evaluation.launch), key="evaluation.launch")
    if running.main:
        evaluate(params, fake_predictor.load, running)
    else:
        take_part(params, running, fake_predictor.load)


entrypoint.run("helm-eval", main)
"""


def launch(folder, processes):
    """Start the evaluation of the fake model under a launch of so many processes, through the launcher."""
    path, params = folder / "launch/cpu-ddp.yaml", folder / "params.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"num_processes": processes}))
    values = yaml.safe_load(params.read_text())
    values["evaluation"] |= {"launch": "cpu" if processes == 1 else "cpu-ddp", "helm_instances": 8, "batch_size": 1}
    values["evaluation"]["helm_threads"] = 2
    params.write_text(yaml.safe_dump(values))
    (folder / "helm_eval.py").write_text(LAUNCHED)
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "vlm_vqa.pipeline.launcher", "--quiet", "--config_file", "evaluation.launch"]
    return subprocess.Popen(
        [*command, "helm_eval.py"], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
    )  # fmt: skip


def reports(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in (folder / "reports").rglob("*") if path.is_file()
    }


@pytest.mark.slow
@pytest.mark.usefixtures("project", "records", "features")
def test_one_two_and_three_processes_and_five_kills_give_the_same_bytes(tmp_path):
    made = {}
    for processes in (1, 2):
        run = launch(tmp_path, processes)
        assert run.wait(600) == 0, run.stderr.read()
        made[processes] = reports(tmp_path)
        shutil.rmtree(tmp_path / "reports")
        assert not (tmp_path / "data/answers.parts").exists()
    assert len(made[1]) > 5 and made[2] == made[1]
    # A tenth of a second an answer: most kills come between two of them, of HELM's or of ours.
    facts = tmp_path / "models/export/vlm_vqa.json"
    facts.write_text('{"seconds": 0.1}')
    kept, draw = [], random.Random(0)
    for number in range(5):
        # Of one process HELM's answers come first, of two those from features.
        run = launch(tmp_path, 1 + number % 2)
        parts, before = tmp_path / "data/answers.parts", len(kept)
        more = draw.randint(1, 2)
        while run.poll() is None and len(kept) < before + more:
            time.sleep(0.02)
            kept = list(parts.glob("*/*.json"))
        assert run.poll() is None, run.stderr.read()
        everyone = [*psutil.Process(run.pid).children(recursive=True), psutil.Process(run.pid)]
        for process in everyone:
            process.send_signal(signal.SIGKILL)
        psutil.wait_procs(everyone, 30)
        kept = list(parts.glob("*/*.json"))
        assert len(kept) > before, "what was answered is still there, and more"
    run = launch(tmp_path, 3)
    _, said = run.communicate(timeout=600)
    assert run.returncode == 0 and f"going on after {len(kept)} batches" in said, said
    assert reports(tmp_path) == made[1]
