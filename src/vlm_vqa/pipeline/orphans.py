"""A process ends when the program that started it has gone.

Otherwise a training whose `dvc repro` was killed goes on for hours, and DVC, which knows nothing of it, deletes its result.
"""

import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

from vlm_vqa.errors import GO_ON

SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_TO_END = 5.0  # between being asked to end and being ended: with the rest, less than ten, on a busy machine too
_PR_SET_PDEATHSIG = 1
_NAME = "parents"

log = logging.getLogger(__name__)


def started_by() -> list[psutil.Process]:
    """Return this process's parent and what stands above it, up to the `dvc` or the launcher that a person has called.

    None where a person has called the stage itself: what ends his shell is no reason to end his work.
    """
    wanted = {"dvc"} if "DVC_STAGE" in os.environ else {"accelerate", "torchrun"}
    chain = []
    for process in psutil.Process().parents():
        chain.append(process)
        if wanted & {Path(word).name for word in _words(process)}:
            return chain
    return []


def _words(process: psutil.Process) -> list[str]:
    """Return the first words of a command line: `python -m dvc repro`, `/usr/bin/python /path/accelerate launch`."""
    try:
        return process.cmdline()[:3]
    except psutil.Error:
        return []


def gone(process: psutil.Process) -> bool:
    """Whether a process has ended, its number given to another or not, waited for by its parent or not."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True


def _orphaned() -> bool:
    """Whether init is the parent, or the parent of the shell by which DVC runs a command and which may have become it."""
    try:
        parent = psutil.Process().parent()
        return parent is None or parent.pid == 1 or (_words(parent)[1:2] == ["-c"] and parent.ppid() == 1)
    except psutil.Error:
        return True  # it has gone meanwhile


def end_with_parents(end: Callable | None = None, parents: Iterable[psutil.Process] | None = None) -> None:
    """Call `end` (by default SIGTERM) from a thread of its own once one of the `parents` (`started_by()`) is gone.

    If this process has not ended within `SECONDS_TO_END`, it is ended. Called again, this does nothing: a stage calls it
    before its imports and when it starts.
    """
    if any(thread.name == _NAME for thread in threading.enumerate()):
        return
    watched = started_by() if parents is None else list(parents)
    # DVC may have started this process and have gone before it could look.
    if watched or ("DVC_STAGE" in os.environ and _orphaned() and not started_by()):
        threading.Thread(target=_watch, args=(watched, end), daemon=True, name=_NAME).start()


def _watch(parents: list[psutil.Process], end: Callable | None) -> None:
    names = {process: " ".join(Path(word).name for word in _words(process)[-2:]) for process in parents}
    while parents and not (lost := [process for process in parents if gone(process)]):
        time.sleep(SECONDS_BETWEEN_LOOKS)
    who = f"{names[lost[0]]} (process {lost[0].pid})" if parents else "dvc"
    log.error("%s, which started this, has gone: ending. %s", who, GO_ON)
    end() if end else os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SECONDS_TO_END)
    os.kill(os.getpid(), signal.SIGKILL)


def die_with_parent() -> None:
    """For `subprocess.Popen(preexec_fn=...)`: let Linux end a child that is not our code when this process is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
