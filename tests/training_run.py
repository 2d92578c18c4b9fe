"""The train stage as seen from outside: start it, look at its steps and checkpoints, stop, kill or finish it."""

import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import psutil

from proofs.project import Project
from vlm_vqa.params import load_params
from vlm_vqa.training import checkpoint_files
from vlm_vqa.training.launch import read_launch

ENVIRONMENT = {
    # Where other work keeps the cores busy, OpenMP threads that spin while they wait make a step 15 times as long.
    "OMP_WAIT_POLICY": "PASSIVE",
    # The progress bar tells every step.
    "TQDM_MININTERVAL": "0",
    # Not the user's own store.
    "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db",
}
ENDS_WITHIN = 35.0
"""Seconds in which all processes end after any of them was killed. torchrun sends SIGTERM to those that are left, and
SIGKILL 30 s later to one that waits in C code for a process that is gone."""
PATIENCE = 300.0
"""Seconds after which a moment that has not come is given up."""
RESUMED = re.compile(r"^train: (?:going on )?from (?:\S*/)?(checkpoint-\d+|the start)$", re.MULTILINE)
PROGRESS = re.compile(r"(\d+)/\d+ \[")


class Training:
    """The train stage from its launch to the end of its last process, as seen from outside.

    with Training(project) as training: leaves no process behind.
    """

    def __init__(self, project: Project):
        self.folder = project.folder
        self.world = processes_of(project)
        self.log = project.folder / "train.log"
        self.started = time.monotonic()
        with open(self.log, "wb") as log:
            # The shell, which fills in the user's OMP_NUM_THREADS, and `env` become the launcher: nothing stands between.
            self.launcher = subprocess.Popen(
                ["/bin/sh", "-c", f"exec {project.stage_command('train')}"],
                cwd=self.folder, env=project.environment(**ENVIRONMENT),
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.launcher.wait()

    def processes(self) -> list[psutil.Process]:
        """Return all processes that are left. torchrun's ranks have sessions of their own, but the folder in common."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.cwd() == str(self.folder):
                    found.append(process)
        return found

    def ranks(self) -> dict[int, psutil.Process]:
        """Return the processes that train, by rank."""
        found = {}
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.launcher.pid).children():
                with suppress(psutil.Error):
                    if process.cmdline()[-1:] == ["stages/train.py"] and "launch" not in process.cmdline():
                        found[int(process.environ().get("RANK", 0))] = process
        return found

    def text(self) -> str:
        """Return what has been printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def step(self) -> int | None:
        """Return how many optimizer steps are done, by the progress bar; None before it appears."""
        text = self.text()
        begun = RESUMED.search(text)
        # Bars before that line are of the preparations.
        shown = PROGRESS.findall(text, begun.end()) if begun else []
        return int(shown[-1]) if shown else None

    def wait_for(self, condition: Callable[[], Any], what: str, pause: float = 0.002) -> Any:
        """Return what `condition` returns as soon as it is true.

        Raises:
            AssertionError: the training has ended before, or it takes too long.
        """
        deadline = time.monotonic() + PATIENCE
        while not (found := condition()):
            if self.launcher.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(
                    f"no kill: the training ended, or {PATIENCE:.0f} s passed, before {what}.\n{self.text()[-3000:]}"
                )
            time.sleep(pause)
        return found

    def torn(self) -> list[Path]:
        """Return the checkpoints that are being written, the oldest first."""
        found = [path for path in self.folder.glob("checkpoints/*/checkpoint-*") if not checkpoint_files.world_of(path)]
        return sorted(found, key=step_of)

    def whole(self) -> list[Path]:
        """Return the whole checkpoints, the newest first."""
        found = [path for path in self.folder.glob("checkpoints/*/checkpoint-*") if checkpoint_files.world_of(path)]
        return sorted(found, key=step_of, reverse=True)

    def freeze_in_checkpoint(self, step: int, rank: int | None) -> Path:
        """Stop all ranks while they write a checkpoint of `step` or later that `rank` (None: any) has not sealed yet."""

        def caught() -> Path | None:
            if not any(step_of(path) >= step for path in self.torn()):
                return None
            ranks = self.ranks()
            self.signal(signal.SIGSTOP, list(ranks.values()))
            for path in self.torn():
                missing = [
                    one for one in range(self.world) if not checkpoint_files.seal_of(path, one, self.world).exists()
                ]
                if (
                    len(ranks) == self.world
                    and step_of(path) >= step
                    and (rank in missing or (rank is None and missing))
                ):
                    return path
            self.signal(signal.SIGCONT, list(ranks.values()))
            return None

        return self.wait_for(caught, f"a checkpoint of step {step} or later was being written", pause=0.0005)

    def signal(self, number: signal.Signals, processes: Sequence[psutil.Process]) -> None:
        """Send a signal; after SIGSTOP wait until they stand still."""
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        if number is signal.SIGSTOP:
            while any(process.is_running() and process.status() not in STILL for process in processes):
                time.sleep(0.0005)

    def kill(self, rank: int | None) -> float:
        """Kill one rank, or all processes; return the seconds until the last process has ended, as `end`."""
        victims = self.processes() if rank is None else [self.ranks()[rank]]
        self.signal(signal.SIGKILL, victims)
        # Those that were stopped to look at a checkpoint.
        self.signal(signal.SIGCONT, self.processes())
        return self.end(victims)

    def end(self, known: Sequence[psutil.Process] = ()) -> float:
        """Wait until all processes, `known` among them, have ended after a signal to some; return the seconds.

        Raises:
            AssertionError: some live longer than `ENDS_WITHIN`, or the launcher reports success.
        """
        start = time.monotonic()
        # A process that is ending has no folder any more, but may have threads.
        watched = {*known, *self.processes()}
        while left := [process for process in watched | set(self.processes()) if lives(process)]:
            assert time.monotonic() - start < ENDS_WITHIN, f"still there {ENDS_WITHIN:.0f} s after the kill: {left}"
            self.launcher.poll()
            time.sleep(0.01)
        seconds = time.monotonic() - start
        assert self.launcher.wait() != 0, "the launcher of a killed training reports success"
        return seconds

    def finish(self) -> None:
        """Wait for the training's end.

        Raises:
            AssertionError: it failed.
        """
        if self.launcher.wait(timeout=PATIENCE) != 0:
            raise AssertionError(f"the train stage failed:\n{self.text()[-3000:]}")


def processes_of(project: Project) -> int:
    """Return how many processes train."""
    launch = load_params(project.folder / "params.yaml").train.launch
    return read_launch(launch, project.folder / "launch").processes


STILL = {psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD}


def lives(process: psutil.Process) -> bool:
    """Whether any thread of a process is left; one that nobody has reaped yet has ended."""
    try:
        return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) or process.num_threads() > 1
    except psutil.NoSuchProcess:
        return False


def step_of(checkpoint: Path) -> int:
    """Return the optimizer steps that a checkpoint's name tells."""
    return int(checkpoint.name.removeprefix("checkpoint-"))
