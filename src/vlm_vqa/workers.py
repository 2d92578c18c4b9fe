"""The worker group of an extraction or evaluation: the processes that were asked for run, or none, and they divide the work.

Each holds a whole model and makes whole parts, so all they have in common is the launcher's store: which part is the next,
and how many images or questions are done. The training's collectives, and its watch over many machines, are not needed
here: torchrun ends all processes of its machine when one of them fails.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from vlm_vqa import cores
from vlm_vqa.launch_file import read_copies

JOIN_SECONDS = 120.0  # between the first and the last process's arrival: imports on a busy machine take long
POLL_SECONDS = 0.02
"""Between looks at the launch's store, which answers in a tenth of a millisecond: the last to end waits for no more."""


@dataclass(frozen=True)
class WorkerGroup:
    """This process among those of the launch; made by `join`."""

    rank: int
    size: int
    device: torch.device
    store: distributed.Store
    threads: cores.Threads

    @property
    def main(self) -> bool:
        """Whether this is the process that does what is done once."""
        return self.rank == 0

    def broadcast(self, key: str, value: Any) -> None:
        """Give all processes a JSON value."""
        self.store.set(key, json.dumps(value))

    def wait_for(self, key: str) -> Any:
        """Return what a process has broadcast; wait until it is there."""
        while not self.store.check([key]):
            time.sleep(POLL_SECONDS)
        return json.loads(self.store.get(key))

    def claim(self, numbers: Sequence[int]) -> Iterator[int]:
        """Yield those of the numbers, the same in all processes, that no other process has taken yet, one at a time."""
        while (place := self.add("taken", 1) - 1) < len(numbers):
            yield numbers[place]

    def add(self, what: str, more: int = 0) -> int:
        """Add to a count that all processes share; return it."""
        return self.store.add(what, more)


def named(launch: str | None) -> str:
    """Return the name of a launch; that of none is of one process, on a GPU where there is one."""
    return launch or ("gpu" if torch.cuda.is_available() else "cpu")


def alone() -> WorkerGroup:
    """Return a group of this process, whatever has started it."""
    return WorkerGroup(0, 1, torch.device("cpu"), distributed.HashStore(), cores.threads())


def join(launch: str, folder: str | Path = "launch", key: str = "vision.launch") -> WorkerGroup:
    """Meet the other processes, and compare what has started with what `launch/NAME.yaml`, which `key` names, asks for.
    UserError if there is no such launch, it divides the model or spans machines, what has started is something else, or
    `OMP_NUM_THREADS` is no number of threads.

    The cores are divided among the processes, unless the user says how many threads each gets. That number changes no bit of
    what is made: torch divides the rows of a product among threads, not its sums (tests/stages/test_extract_features.py).
    """
    asked = read_copies(launch, folder, key)
    size, rank, local_rank = (
        int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0))
    )
    asked.compare({"num_processes": asked.processes}, {"num_processes": size})
    if asked.on_cpu:
        device = torch.device("cpu")
    else:
        asked.compare({"GPUs": size}, {"GPUs": min(size, torch.cuda.device_count())})
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    threads = cores.threads(size)
    torch.set_num_threads(threads.count)
    store: distributed.Store = distributed.HashStore()
    if size > 1:
        # torchrun describes its store in the environment.
        store, _, _ = next(distributed.rendezvous("env://", timeout=timedelta(seconds=JOIN_SECONDS)))
    group = WorkerGroup(rank, size, device, distributed.PrefixStore(key, store), threads)
    group.add("arrived", 1)
    latest = time.monotonic() + JOIN_SECONDS
    while group.add("arrived") < size and time.monotonic() < latest:
        time.sleep(POLL_SECONDS)
    asked.compare({"num_processes": size}, {"num_processes": group.add("arrived")})
    return group
