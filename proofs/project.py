"""A temporary copy of the project with params of its own, in which stages and `dvc repro` run as a user runs them."""

import copy
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import yaml

from benchmarks import vqav2
from vlm_vqa.errors import UserError
from vlm_vqa.hashing import sha256_file

ROOT = Path(__file__).parents[1]
# Never what a user changes or a run writes: not params.yaml (the small preset stands for it), not what lies in data/vqav2.
PARTS = {
    ".dvc/config": ".dvc/config",
    ".dvcignore": ".dvcignore",
    "dvc.yaml": "dvc.yaml",
    "presets/small.yaml": "params.yaml",
    "data/vqav2/README.md": "data/vqav2/README.md",
    "evaluation": "evaluation",
    "launch": "launch",
    "src": "src",
    "stages": "stages",
}

# Small enough for a minute, and everything that a real run has.
TINY = {
    "data.source": "directory",
    "language.config.hidden_size": 32,
    "language.config.intermediate_size": 64,
    "language.config.num_hidden_layers": 1,
    "train.batch_size": 16,
    "train.num_train_epochs": 2,
    "train.learning_rate": 3e-3,
    "train.logging_steps": 1,
    "train.save_steps": 2,
    "prompt.text_length": 128,
    # A validation of its own asks for it: the sample has few questions.
    "validation.questions": 0,
    "validation.train_questions": 0,
    "validation.keep": "last",
    "evaluation.helm_instances": 20,
    "evaluation.helm_threads": 4,
}


class Project:
    """A copy of the project in `folder`; commands run with this environment's programs and a store of their own."""

    def __init__(self, folder: Path, changes: dict[str, Any]):
        self.folder = folder
        for part, target in PARTS.items():
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, folder / target, ignore=shutil.ignore_patterns("__pycache__", "images"))
            else:
                shutil.copy(ROOT / part, folder / target)
        subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
        self.set({**TINY, **changes})

    @classmethod
    def at(cls, folder: Path) -> Self:
        """Return a copy that is there already."""
        project = cls.__new__(cls)
        project.folder = folder
        return project

    def set(self, changes: dict[str, Any]) -> None:
        """Change keys of params.yaml, given by their full names."""
        path = self.folder / "params.yaml"
        values = with_changes(yaml.safe_load(path.read_text()), changes)
        path.write_text(yaml.safe_dump(values, sort_keys=False))

    def environment(self, **more: str) -> dict[str, str]:
        """Return what a shell with the activated environment has.

        Threads that wait for each other sleep: on a busy machine spinning ones take fifteen times as long.
        """
        programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return {
            **os.environ,
            "PATH": programs,
            "PYTHONPATH": "src:.",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            **more,
        }

    def command(self, command: str, **more: str) -> subprocess.CompletedProcess:
        """Run a shell command in the copy and return its outcome, output captured."""
        return subprocess.run(
            command,
            shell=True,
            cwd=self.folder,
            env=self.environment(**more),
            capture_output=True,
            text=True,
            timeout=900,
        )

    def stage(self, name: str, **more: str) -> subprocess.CompletedProcess:
        """Run one stage as dvc.yaml says, without DVC."""
        return self.command(self.stage_command(name), **more)

    def stage_command(self, name: str) -> str:
        """Return the stage's command line, templates filled in."""
        values = yaml.safe_load((self.folder / "params.yaml").read_text())
        command = yaml.safe_load((self.folder / "dvc.yaml").read_text())["stages"][name]["cmd"]
        for section in ("vision", "train"):
            command = command.replace(f"${{{section}.launch}}", values[section]["launch"])
        return command


def with_changes(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return parameters with some changed, given by their full names."""
    values = copy.deepcopy(values)
    for key, value in changes.items():
        *names, last = key.split(".")
        place = values
        for name in names:
            place = place[name]
        place[last] = value
    return values


def clear(project: Project) -> None:
    """Remove what a training has written."""
    for name in ("models", "reports", "checkpoints"):
        shutil.rmtree(project.folder / name, ignore_errors=True)


def outcome(project: Project) -> dict[str, str]:
    """Return the hash of every file that the stage has written."""
    files = [path for name in ("models", "reports") for path in (project.folder / name).rglob("*") if path.is_file()]
    return {path.relative_to(project.folder).as_posix(): sha256_file(path) for path in files}


def sample_params(shared_data: Path) -> dict[str, Any]:
    """Return the changes that make the real VQAv2 sample both splits: it shows the plumbing, not a score."""
    files = {
        "questions": "questions.json",
        "annotations": "annotations.json",
        "images": "images",
        "image_name": "COCO_train2014_{image_id:012d}.jpg",
    }
    return {
        "data.directory": str(shared_data / "vqav2-sample"),
        "data.train": files,
        "data.val": files,
        "data.allow_split_overlap": True,
    }


@contextmanager
def workplace(folder: Path | None) -> Generator[Path]:
    """Yield a folder that stays, or a temporary one."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="proofs-") as scratch:
            yield Path(scratch).resolve()
    else:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder.resolve()


def own_sample(folder: Path) -> dict[str, Any]:
    """Copy VQAv2's sample, real or drawn, into `folder` unless it is there; return the changes that make it the data."""
    place = folder / vqav2.SAMPLE
    if not place.exists():
        with vqav2.sample() as sample:
            shutil.copytree(sample, place)
        for path in (place, *place.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
    return sample_params(folder)


@contextmanager
def finished(folder: Path | None, name: str, changes: dict[str, Any]) -> Generator[Path]:
    """Yield a copy in which all stages have run on the sample: `folder/name`, made if it is not there, or a temporary one.

    Raises:
        UserError: a stage failed.
    """
    with workplace(folder) as place:
        project = Project.at(place / name)
        if not (project.folder / "reports/metrics.json").exists():
            shutil.rmtree(project.folder, ignore_errors=True)
            project = Project(project.folder, {**own_sample(place), **changes})
            done = project.command("dvc repro 2>&1", MLFLOW_TRACKING_URI="sqlite:///mlflow.db")
            if done.returncode:
                raise UserError(f"dvc repro failed:\n{done.stdout[-3000:]}")
        yield project.folder
