"""A shell command and every process that it starts, as a person at a terminal and a process table see them."""

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

from vlm_vqa.errors import UserError

MARK = "VLM_VQA_PROOF"
"""In the environment of all processes of a call: torchrun's ranks have sessions of their own, orphans have no parent."""
OUTLIVES_BY = 10.0
"""Seconds that a process may live after its parent."""
LOOK = 0.2


class Call:
    """A command in a session of its own, its output in a file.

    with Call(...) as call: leaves no process behind.

    Attributes:
        outlived: the most seconds that a process has lived after its parent.
        output: the file.
    """

    def __init__(self, command: str, folder: Path, environment: dict[str, str], output: Path):
        self._mark = uuid.uuid4().hex
        self._parents: dict[psutil.Process, psutil.Process | None] = {}
        self._orphaned: dict[psutil.Process, float] = {}
        self.outlived, self.started, self.output = 0.0, time.monotonic(), output
        with output.open("wb") as file:
            self.shell = subprocess.Popen(
                ["/bin/bash", "-c", command],
                cwd=folder,
                env={**environment, MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.shell.wait()

    def seconds(self) -> float:
        """Return how long ago it was started."""
        return time.monotonic() - self.started

    def text(self) -> str:
        """Return what has been printed."""
        return self.output.read_text(encoding="utf-8", errors="replace")

    def processes(self) -> list[psutil.Process]:
        """Return the living processes, the shell among them."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self._mark and process.status() not in (psutil.STATUS_ZOMBIE,):
                    found.append(process)
        return found

    def watch(self) -> list[psutil.Process]:
        """Return the living processes, and note how long each has lived after its parent."""
        self.shell.poll()
        living, now = self.processes(), time.monotonic()
        for process in living:
            if process not in self._parents:
                with suppress(psutil.Error):
                    self._parents[process] = process.parent()
        for process in living:
            parent = self._parents.get(process)
            # The shell's own parent is this program; a process that was first seen as an orphan has none that is known.
            alive = process.pid == self.shell.pid or (parent is not None and parent.pid != 1 and lives(parent))
            if not alive:
                self.outlived = max(self.outlived, now - self._orphaned.setdefault(process, now))
        return living

    def victims(self) -> list[psutil.Process]:
        """Return the living processes but the shell, the person who calls; it may have become the command itself."""
        return [one for one in self.watch() if one.pid != self.shell.pid or not name(one).startswith("bash")]

    def wait(self, until: Callable[[], bool], seconds: float, pause: float = 0.002) -> bool:
        """Wait until something is so; return False if the command ends or the time passes before."""
        deadline = time.monotonic() + seconds
        while not until():
            if self.shell.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(pause)
        return True

    def most(
        self, measure: Callable[[psutil.Process], int], until: Callable[[], bool], seconds: float, pause: float = 0.05
    ) -> int:
        """Return the most that all processes together had of something until something is so.

        Raises:
            UserError: the command ends or the time passes before.
        """
        most, deadline = 0, time.monotonic() + seconds
        while True:
            # What comes after may have begun while the processes were looked at.
            now = sum(map(measure, self.processes()))
            if until():
                return most
            if self.shell.poll() is not None or time.monotonic() > deadline:
                raise UserError(f"it did not come so far:\n{self.text()[-2000:]}")
            most = max(most, now)
            time.sleep(pause)

    def end(self, patience: float) -> str | None:
        """Wait for the end of the last process; return what is wrong with it, or None."""
        deadline = time.monotonic() + patience
        while living := self.watch():
            if self.outlived > OUTLIVES_BY:
                left = [one for one in living if one in self._orphaned]
                return f"outlived its parent by more than {OUTLIVES_BY:.0f} s: {', '.join(map(name, left))}"
            if time.monotonic() > deadline:
                return f"not ended after {patience:.0f} s: {', '.join(map(name, living))}"
            time.sleep(LOOK)
        self.shell.wait()
        return None

    def signal(self, number: signal.Signals, victim: psutil.Process | None) -> None:
        """Send a signal to a process, or to all: as Ctrl-C does, to those in the terminal's foreground; SIGKILL to each."""
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if victim is not None:
                victim.send_signal(number)
            elif number is signal.SIGKILL:
                for process in self.processes():
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
            else:
                os.killpg(self.shell.pid, number)


def lives(process: psutil.Process) -> bool:
    """Whether a process has not ended; one that nobody has reaped yet has."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def name(process: psutil.Process) -> str:
    """Name a process by its program's first words, without folders."""
    try:
        words = [Path(word).name for word in process.cmdline()] or [process.name()]
    except psutil.Error:
        return "one that has just ended"
    return " ".join(word[:30] for word in words[:6] if not word.startswith("--"))[:60]
