"""The train stage as it is launched: what it writes, what it refuses, and how it goes on after a signal."""

import json
import subprocess
import time

import pytest

from tests.pipeline import Project, sample_params

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, shared_data):
    """A project on the tiny official layout whose first two stages have run."""
    project = Project(tmp_path_factory.mktemp("train"), sample_params(shared_data))
    for name in ("fetch-vqav2", "extract-features"):
        done = project.stage(name)
        assert done.returncode == 0, done.stderr
    return project


def hashes(project):
    return json.loads((project.folder / "models/trained/training.json").read_text())


def test_terminated_and_run_again_it_ends_as_if_never_stopped(prepared):
    done = prepared.stage("train")
    assert done.returncode == 0, done.stderr[-3000:]
    straight = hashes(prepared)
    report = json.loads((prepared.folder / "reports/train.json").read_text())
    assert report["questions"] == 109 and report["steps"] == 14 and report["last_loss"] < report["first_loss"]

    process = subprocess.Popen(
        prepared.stage_command("train"), shell=True, cwd=prepared.folder, env=prepared.environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 180
    while not list(prepared.folder.glob("checkpoints/*/checkpoint-*/complete.json")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    subprocess.run(["pkill", "-TERM", "-g", str(process.pid)], check=True)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode != 0, errors
    assert list(prepared.folder.glob("checkpoints/*/checkpoint-*"))

    again = prepared.stage("train")
    assert again.returncode == 0, again.stderr[-3000:]
    assert "going on from checkpoints/" in again.stderr
    assert hashes(prepared) == straight
    assert not list(prepared.folder.glob("checkpoints/*/*"))


def test_features_of_another_encoder_are_refused(prepared):
    manifest = prepared.folder / "data/features/manifest.json"
    text = manifest.read_text()
    try:
        found = json.loads(text)
        manifest.write_text(json.dumps({**found, "encoder_hash": "0" * 64}))
        done = prepared.stage("train")
        assert done.returncode != 0
        assert (
            "encoder_hash" in done.stderr and "extract-features" in done.stderr and "Traceback (most" not in done.stderr
        )
    finally:
        manifest.write_text(text)
