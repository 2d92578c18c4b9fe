"""How many threads a process gets and why, and whether it gets the cores that they need.

OpenMP's threads wait for each other at the end of every product, so one that has no core holds up all: more threads than
free cores cost far more than they bring.
"""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from vlm_vqa.errors import UserError

VARIABLE = "OMP_NUM_THREADS"
CARRIED = "VLM_VQA_THREADS"
"""dvc.yaml's commands put the user's `OMP_NUM_THREADS` here: accelerate ends in a traceback where it is no plain number."""
LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
"""`accelerate launch` and torchrun set these for the processes that they start, and an `OMP_NUM_THREADS` of their own."""
OPTION = re.compile(r"--num[_-]cpu[_-]threads[_-]per[_-]process[\0=]([^\0]+)")
"""accelerate's own, on its command line; it drops it where DeepSpeed is asked for."""
WANTED_SECONDS = 20.0  # of cores, used or waited for, before a process is judged: a moment's load is none
LEAST_SHARE = 1 / 3  # of them, used: beside two busy programs two threads are as fast as one


@dataclass(frozen=True)
class Threads:
    """A number of threads or cores, at least 1, and what has decided it."""

    count: int
    why: str

    def __str__(self) -> str:
        return f"{self.count} ({self.why})"


def usable_cores(root: Path = Path("/")) -> Threads:
    """Return how many cores this process may use: its affinity (taskset, cpuset) or, if less, its cgroups' quota."""
    machine = os.cpu_count() or 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine
    quota = float("inf")
    with suppress(OSError):  # another system
        # A container may see its cgroup as the root, but the host's path in the process's file: of that nothing is there.
        for own in map(Path, re.findall("(?m)^0::/(.*)$", (root / "proc/self/cgroup").read_text())):
            for group in (own, *own.parents):
                with suppress(OSError, ValueError):  # none here, or `max`
                    most, period = (root / "sys/fs/cgroup" / group / "cpu.max").read_text().split()
                    quota = min(quota, int(most) / int(period))
    if quota < cores:
        return Threads(max(1, int(quota)), f"cgroup quota of {quota:.1f} CPU{'s' * (quota != 1)}")
    return Threads(cores, "affinity of " * (cores < machine) + f"{cores} core{'s' * (cores != 1)}")


def threads(processes: int = 1, root: Path = Path("/")) -> Threads:
    """Return how many threads each of this machine's `processes` gets: its part of the cores, or what the user says;
    UserError if that, `OMP_NUM_THREADS`, is no number of threads."""
    cores = usable_cores(root)
    part = Threads(max(1, cores.count // processes), f"{cores.why} / {processes} process{'es' * (processes != 1)}")
    own = dict(os.environ)
    # A launcher sets it for its processes whether or not the user has; what the launcher itself was started with tells.
    with suppress(psutil.Error):  # another user's process, or another system
        launcher = psutil.Process(os.getppid())
        theirs = launcher.environ()
        if any(name in own and name not in theirs for name in LAUNCHED):
            option = OPTION.search("\0".join(launcher.cmdline()))
            own[VARIABLE] = option[1] if option else theirs.get(VARIABLE, "")
    if not (said := own.get(CARRIED, own.get(VARIABLE, "")).strip()):
        return part
    # OpenMP allows a list, for parallel regions inside others; there are none.
    found = re.fullmatch(r"([1-9][0-9]{0,3})(\s*,\s*[1-9][0-9]*)*", said)
    if found is None:
        number = "a number of threads from 1 to 9999"
        raise UserError(f"{VARIABLE} is {said!r}; set it to {number}, or unset it for {part}.")
    count = int(found[1])
    return Threads(count, VARIABLE + f", more than {part.why}" * (count > part.count))


class Crowd:
    """Notices, once, that a process's threads wait for a core most of the time that they could run. Waiting for data, a
    disk or other processes does not count: the system counts threads that are ready to run."""

    def __init__(self, threads: Threads):
        self.threads = threads
        self._last: Mapping[str, tuple[float, float]] | None = {}

    def notice(self, now: Mapping[str, tuple[float, float]]) -> str | None:
        """Return what to tell the user, if anything; `now` is `waits()`."""
        if self._last is None:
            return None
        before = {thread: self._last.get(thread, (0.0, 0.0)) for thread in now}
        ran, waited = (sum(max(0.0, times[i] - before[thread][i]) for thread, times in now.items()) for i in (0, 1))
        if ran + waited < WANTED_SECONDS:
            return None
        share = ran / (ran + waited)
        self._last = now if share >= LEAST_SHARE else None
        if share >= LEAST_SHARE:
            return None
        busy = f"the machine is busy: this process gets {share:.0%} of the time that it wants of its cores"
        if self.threads.count == 1:
            return f"{busy}. End other programs, or let it go on: it only takes longer."
        why = f"its {self.threads.count} threads wait for each other: {VARIABLE}=1 would be faster"
        return f"{busy}, and {why}. End other programs, or stop this and start it again so."


def waits() -> dict[str, tuple[float, float]]:
    """Return the seconds that each thread of this process has run, and has waited for a core; none where no system tells."""
    found = {}
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError):  # the thread has just ended
            ran, waited, _ = path.read_text().split()
            found[path.parts[-2]] = int(ran) / 1e9, int(waited) / 1e9
    return found
