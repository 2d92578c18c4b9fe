"""The project with none to five of its stages done, under one launch: where a run that is to be killed begins, and ends."""

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import measure
from proofs import tree
from proofs.project import ROOT, Project, own_sample
from vlm_vqa.errors import UserError

STAGES = ("fetch-vqav2", "extract-features", "train", "export", "helm-eval")
EIGHT_BIT = {"train.optimizer": "adamw_bnb_8bit", "train.percentile_clipping": 95}
LAUNCHES = {
    "cpu": {"train.optimizer": "adamw_torch", "train.batch_size": 8},
    "cpu-ddp": {**EIGHT_BIT, "train.batch_size": 4, "vision.launch": "cpu-ddp"},
    "cpu-fsdp2": {**EIGHT_BIT, "train.batch_size": 4},
}
# Whatever a resumed run could lose shows in its weights: dropout draws random numbers, epochs draw other answers, the logged
# loss is a mean that begins before a checkpoint and ends after it, the projector's phase ends between two checkpoints.
SETTINGS = {
    "train.projector_learning_rate": 9e-3,
    "train.embedding_learning_rate": 5e-4,
    "train.projector_steps": 3,
    "train.answers": "drawn",
    "train.dropout": 0.1,
    "train.logging_steps": 3,
    "train.save_steps": 2,
    "prompt.text_length": 192,
    "validation.questions": 20,
    "validation.train_questions": 10,
    "validation.every_steps": 3,
    "validation.keep": "best",
}
BARE, MAKE = "dvc repro", "make repro"
PATIENCE = 600.0


class States:
    """Where trials of one launch happen: `state-N`, the project with N stages done, is copied to `trial`."""

    def __init__(self, folder: Path, launch: str):
        """Make everything that is not there yet: two undisturbed runs, about 3 minutes."""
        self.folder, self.launch = folder / launch, launch
        self.place = self.folder / "trial"
        if not (self.folder / "seconds.json").exists():
            self._prepare(own_sample(folder))
        self.seconds: dict[str, float] = json.loads((self.folder / "seconds.json").read_text(encoding="utf-8"))
        self.expected = (self.folder / "dvc.lock").read_bytes()

    def _prepare(self, data: dict[str, Any]) -> None:
        """Run everything once undisturbed, then stage by stage, and keep a copy after each."""
        shutil.rmtree(self.folder, ignore_errors=True)
        Project(self.folder / "state-0", {**data, **SETTINGS, "train.launch": self.launch, **LAUNCHES[self.launch]})
        self.restore(0)
        self._undisturbed(BARE)
        whole, seconds = (self.place / "dvc.lock").read_bytes(), {}
        self.restore(0)
        for number, stage in enumerate(STAGES, 1):
            seconds[stage] = self._undisturbed(f"{BARE} {stage}")
            copy(self.place, self.folder / f"state-{number}")
        if (self.place / "dvc.lock").read_bytes() != whole:
            raise AssertionError("two undisturbed runs have written two dvc.locks")
        (self.folder / "dvc.lock").write_bytes(whole)
        (self.folder / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")

    def _undisturbed(self, command: str) -> float:
        """Run a command to its end and return the seconds."""
        with self.call(command) as call:
            wrong = call.end(PATIENCE)
            if wrong or call.shell.returncode:
                wrong = wrong or f"it {measure.ended(call.shell.returncode)}"
                raise UserError(f"{self.launch}: {command} failed undisturbed: {wrong}\n{call.text()[-3000:]}")
            return call.seconds()

    def restore(self, state: int) -> None:
        """Begin anew with so many stages done."""
        shutil.rmtree(self.place, ignore_errors=True)
        copy(self.folder / f"state-{state}", self.place)

    def call(self, command: str) -> tree.Call:
        """Start a command in the copy as a person does; `MAKE` is what the Makefile does once the environment is there."""
        if command == MAKE:
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            (command,) = re.findall(r"\nrepro:.*\n\tsource \S+ && (.*)", makefile)
            # Held to `dvc repro` by itself, which takes all instructions that the CPU has.
            command = command.replace("env $(SAME_BITS) ", "")
        # Not the user's own store, and no index of DVC's that knows an earlier trial.
        own = {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db", "DVC_SITE_CACHE_DIR": str(self.place / ".git/site")}
        environment = Project.at(self.place).environment(**own)
        return tree.Call(command, self.place, environment, self.folder / "terminal.txt")

    def left(self) -> float:
        """Return how many seconds the stages take that dvc.lock has not."""
        lock = self.place / "dvc.lock"
        done = re.findall(r"^  ([\w-]+):$", lock.read_text(encoding="utf-8"), re.MULTILINE) if lock.exists() else []
        return sum(seconds for stage, seconds in self.seconds.items() if stage not in done) or 1.0


class Changes:
    """Counts how often any of some files or folders has changed since this was made."""

    def __init__(self, paths: Sequence[Path]):
        self._paths, self._count = paths, 0
        self._last = self._now()

    def _now(self) -> list[tuple[int, int] | None]:
        found: list[tuple[int, int] | None] = []
        for path in self._paths:
            try:
                state = path.stat()
                found.append((state.st_mtime_ns, state.st_size))
            except OSError:
                found.append(None)
        return found

    def seen(self) -> int:
        """Look, and return the count."""
        if (now := self._now()) != self._last:
            self._last, self._count = now, self._count + 1
        return self._count


def copy(source: Path, target: Path) -> None:
    """Copy a folder; files that are one by a hard link, as outputs and DVC's cache, stay one."""
    subprocess.run(["cp", "-a", str(source), str(target)], check=True)
