"""A disk that is full or read-only: one clear message that names it, exit code 2, and earlier results intact."""

import os
import subprocess
from pathlib import Path

import pytest

from proofs.project import Project
from tests.conftest import write_vqav2

pytestmark = pytest.mark.slow


@pytest.fixture
def mounted(tmp_path):
    """A function that mounts a small file system at a folder; all are unmounted at the end."""
    folders = []

    def mount(folder: Path, options: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"no small file system can be mounted here: {done.stderr.strip()}")
        folders.append(folder)

    yield mount
    for folder in folders:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project whose first two stages have run; what is mounted over their outputs hides them for a test's time."""
    folder = tmp_path_factory.mktemp("disks")
    project = Project(folder / "project", {"data.directory": str(write_vqav2(folder / "vqav2", size=(320, 240)))})
    for name in ("fetch-vqav2", "extract-features"):
        assert project.stage(name).returncode == 0
    return project


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize(
    ("options", "words"), [("size=16k", "the disk is full"), ("ro", "the file system is read-only")]
)
def test_fetch_and_extract_say_what_to_do(project, mounted, options, words):
    mounted(project.folder / "data/features", options)
    done = project.stage("extract-features")
    # accelerate's launcher turns the stage's 2 into 1.
    assert done.returncode != 0, done.stderr
    assert words in done.stderr and "dvc repro" in done.stderr and "Traceback" not in done.stderr
    assert (project.folder / "data/records/manifest.json").is_file()

    mounted(project.folder / "data/records", options)
    done = project.stage("fetch-vqav2")
    assert done.returncode == 2, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_while_a_checkpoint_is_written(project, mounted):
    mounted(project.folder / "checkpoints", "size=400k")
    done = project.stage("train")
    assert done.returncode != 0
    assert "/checkpoint-" in done.stderr and "the disk is full" in done.stderr and "Traceback" not in done.stderr
    assert not (project.folder / "models/trained/training.json").exists()
    assert (project.folder / "data/features/manifest.json").is_file()
