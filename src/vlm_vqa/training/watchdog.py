"""A rank that dies, hangs or raises an error ends all ranks, and is named.

Nothing else does that: a collective waits for half an hour, and torchrun sees only the processes of its own machine.
So every rank tells the others once a tick, through the launcher's store, that it runs and how far it has come; the first
to see why all have to end writes that there, and the others quote it.

What happens to one rank, and when the last of the others has ended (t = `tick_seconds`, 1; d = `dead_seconds`, 10):

    it raises an error                                     8t + 8 s
    it dies, is frozen, or its machine is gone         d + 8t + 8 s
    the store's machine, or launcher, is gone          d + 8t + 8 s
    it hangs while its threads run         stall_seconds + 8t + 8 s after the last heartbeat of any rank

The 8 s are there for telling the others (2), printing (1) and `on_end` (5). Time is counted in ticks that a rank ran and
answers that it got: on a machine that is overloaded or was suspended, all of this takes longer, and no rank is blamed for
it. A thread cannot run while C code holds the GIL: parsing a JSON file of gigabytes looks frozen. (Collectives, torch's
and safetensors' loading and saving let it go.)
"""

import atexit
import enum
import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection
from datetime import timedelta
from typing import Any, NamedTuple, Self

import psutil
import torch.distributed as dist
from pydantic import TypeAdapter

from vlm_vqa.errors import UserError

# sysexits.h's "temporary failure, try again": not 1 (a traceback) and not 2 (a user's mistake), whose cause this rank has.
EXIT_ENDED = 75
TICK_SECONDS = 1.0
DEAD_SECONDS = 10.0
# Between a rank's own error and its forced end: its traceback, its MLflow run and its files come first.
UNWIND_SECONDS = 30.0
TELL_SECONDS, PRINT_SECONDS, ON_END_SECONDS = 2.0, 1.0, 5.0
STORE_SECONDS = 5.0
_DONE = "is done"
_NEXT_STEP = "Mend that, then run `dvc repro` again: it goes on from the last checkpoint."


class Phase(enum.IntEnum):
    """The phases of a step, in their order: of two ranks in one step, the one in the lower phase is behind."""

    STARTING = 0
    LOADING = 1
    COUNTING = 2
    COMPUTING = 3
    UPDATING = 4
    VALIDATING = 5
    SAVING = 6
    WAITING = 7  # at a barrier, with nothing left to do: whoever is still busy keeps the others waiting


class Progress(NamedTuple):
    """How far a rank has come; ordered. `beats` counts within one phase of one step, e.g. forward passes."""

    step: int = 0
    phase: Phase = Phase.STARTING
    beats: int = 0

    def __str__(self) -> str:
        return f"{self.phase.name} of step {self.step}" + (f", part {self.beats}" if self.beats > 1 else "")


class Heartbeat(NamedTuple):
    host: str
    tick: int  # Changes as long as the process runs, whatever its main thread does.
    place: Progress
    idle: float  # Seconds since the last heartbeat, by the rank's own ticks: clocks of two machines are never compared.
    left: str = ""  # It is done, or was told to end, when the cause is elsewhere.

    @property
    def done(self) -> bool:
        return self.left == _DONE


_RECORD = TypeAdapter(Heartbeat)


class Watchdog:
    """Watches over the ranks of one training; used by the main thread of each, and inert when there is only one.

    Leaving its `with` block tells the others how: done, told to end (SIGTERM, Ctrl-C), or the error, which ends them.

    Args:
        store: this rank's own connection (see `connect`): a client that waits for an answer serves nobody else.
        stall_seconds: longer than any healthy pause between two beats: the model's loading, a first compilation, a
            checkpoint's writing.
        on_end: called with the reason before this rank is ended, for at most `ON_END_SECONDS`.
        host: how messages call this machine.
    """

    def __init__(
        self,
        store: dist.Store | None,
        rank: int,
        world_size: int,
        stall_seconds: float,
        *,
        dead_seconds: float = DEAD_SECONDS,
        tick_seconds: float = TICK_SECONDS,
        on_end: Callable[[str], None] | None = None,
        host: str | None = None,
    ):
        assert store is not None or world_size == 1, "several ranks need a store: connect(world_size)"
        self._store, self._rank, self._host = store, rank, host or socket.gethostname()
        self._stall_seconds, self._dead_seconds, self._tick_seconds = stall_seconds, dead_seconds, tick_seconds
        self.on_end = on_end
        # Elsewhere a parent that ends first means nothing: a shell script may start ranks and go.
        self._launcher_pid = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._place = self._last_place = Progress()
        self._idle = 0.0
        self._records: dict[int, Heartbeat] = {}
        self._silence = {other: 0.0 for other in range(world_size) if other != rank}
        self._unanswered = 0.0
        self._left, self._end, self._verdict, self._speaks = "", "", "", True
        self._unwinding_since: float | None = None
        self._ticks = itertools.count()
        self._stopping, self._ceasing = threading.Event(), threading.Event()
        self._wake, self._told = threading.Event(), threading.Event()

    def __enter__(self) -> Self:
        """Begin to watch. Every rank has to do so within `stall_seconds`."""
        if self._store is not None:
            atexit.register(self._cease)
            # Two threads: most calls to a store whose server is frozen return only when it goes on, whatever their
            # timeout. The one that judges must not wait with them.
            self._talker = threading.Thread(target=self._talk, args=(self._store,), name="watchdog", daemon=True)
            self._talker.start()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def heartbeat(self, phase: Phase, step: int) -> None:
        """Say that this rank now begins `phase` of `step`, or the next part of it; as often on every rank."""
        before = self._place
        same = before.step == step and before.phase == phase
        # One assignment: the other threads see the old place or the new one.
        self._place = Progress(step, phase, before.beats + 1 if same else 1)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._store is None:
            return
        if isinstance(error, KeyboardInterrupt):
            self._left = "was interrupted (Ctrl-C)"
        elif isinstance(error, SystemExit) and error.code == 128 + signal.SIGTERM:
            self._left = "was told to end (SIGTERM)"
        elif error is None or (isinstance(error, SystemExit) and not error.code):
            self._left = _DONE
        if self._left == _DONE:
            self._stopping.set()
            self._tell()
        elif not self._left:
            # NCCL and the store have exceptions of their own; gloo's is a RuntimeError with the place in its source.
            if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error)):
                # Another rank's end came first. This one's thread names it and does not come back from that.
                time.sleep(self._dead_seconds + 8 * self._tick_seconds + TELL_SECONDS + PRINT_SECONDS + ON_END_SECONDS)
            self._unwinding_since = time.monotonic()
            message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            self._end = f"rank {self._rank} ({self._host}) stopped: {message}"
            self._tell()
        # Told to end: the threads go on. Should this rank not come to its end, or another be dead, they will say so.

    def _cease(self) -> None:
        # Python kills threads that come back from C++ while it shuts down, and torch answers that with SIGABRT.
        self._ceasing.set()
        self._unwinding_since = self._unwinding_since or time.monotonic()
        self._wake.set()
        self._talker.join(TELL_SECONDS)

    def _tell(self) -> None:
        """Have the talker publish how this rank ends, and give it some time."""
        self._wake.set()
        self._told.wait(TELL_SECONDS)

    def _talk(self, store: dist.Store) -> None:
        """Publish this rank's record and read the others', once a tick, until this rank has published its end."""
        reported, connected = set[int](), True
        while True:
            record = Heartbeat(self._host, next(self._ticks), self._place, self._idle, self._left)
            try:
                # A client whose connection broke never mends it.
                store = store if connected else store.clone()
                connected = True
                store.set(str(self._rank), _RECORD.dump_json(record).decode())
                self._agree(store)
                # multi_get would wait for a rank that has not reported yet.
                reported |= {other for other in self._silence.keys() - reported if store.check([str(other)])}
                values = store.multi_get([str(other) for other in reported])
            except RuntimeError:
                # The base of all that torch's stores raise. How long this may last is the judge's matter.
                connected = False
            else:
                self._hear({other: _RECORD.validate_json(value) for other, value in zip(reported, values, strict=True)})
                if record.done:
                    self._told.set()
            if record.done or self._ceasing.is_set():
                return
            self._wake.wait(self._tick_seconds)
            self._wake.clear()

    def _agree(self, store: dist.Store) -> None:
        """Settle why all ranks end: the first to write it is right, and one rank of each machine prints it."""
        end = self._end
        if end:
            self._verdict = store.compare_set("end", "", end).decode()
            # A rank that ends by its own error shows that itself, and may be gone before it could print more.
            if self._unwinding_since is None:
                speaker = store.compare_set(f"speaker/{self._host}", "", str(self._rank)).decode()
                self._speaks = speaker == str(self._rank)
            self._told.set()
        elif store.check(["end"]):
            self._verdict = store.get("end").decode()

    def _hear(self, records: dict[int, Heartbeat]) -> None:
        """Note what the store has answered: the records of all other ranks that have reported so far."""
        for other, record in records.items():
            silent = other in self._records and self._records[other].tick == record.tick
            self._silence[other] = self._silence[other] + self._tick_seconds if silent else 0.0
        self._records, self._unanswered = records, 0.0

    def _watch(self) -> None:
        while not self._stopping.wait(self._tick_seconds):
            self._count_tick()
            if self._unwinding_since is None:
                if reason := self._reason():
                    self._finish(reason)
            elif time.monotonic() - self._unwinding_since > UNWIND_SECONDS:
                late = f"was about to end, and did not within {UNWIND_SECONDS:.0f} s."
                self._end_process(f"rank {self._rank} ({self._host}) {late}")

    def _count_tick(self) -> None:
        self._idle = 0.0 if self._place is not self._last_place else self._idle + self._tick_seconds
        self._last_place = self._place
        # Ctrl-Z stops torchrun, which keeps the store, but not the ranks. When it goes on, it needs its time.
        self._unanswered = 0.0 if _is_stopped(self._launcher_pid) else self._unanswered + self._tick_seconds

    def _finish(self, reason: str) -> None:
        """Agree with the other ranks on the reason, and end this one."""
        if self._verdict:
            # A rank that wrote its own error shall end first: then torchrun, too, calls it the root cause.
            time.sleep(2 * self._tick_seconds)
        self._end = reason
        self._tell()
        self._end_process(self._verdict or reason)

    def _end_process(self, reason: str) -> None:
        """End this process, whatever its main thread does: no signal interrupts a collective."""
        if self._speaks:
            line = f"\nwatchdog of rank {self._rank}: {reason} All ranks end now. {_NEXT_STEP}\n"
            _within(PRINT_SECONDS, lambda: print(line, end="", file=sys.stderr, flush=True))
        if (on_end := self.on_end) is not None:
            _within(ON_END_SECONDS, lambda: on_end(reason))
        os._exit(EXIT_ENDED)

    def _reason(self) -> str | None:
        """Say why all ranks have to end, as far as this one can know; None: they do not."""
        if self._verdict:
            return self._verdict
        if self._launcher_pid not in (None, os.getppid()):
            return f"the launcher of the ranks on {self._host} is gone."
        # Where rank 0 keeps the store itself, it takes it along when it has finished.
        if self._unanswered > self._dead_seconds and not (0 in self._records and self._records[0].done):
            return (
                "the launcher's store on the machine of rank 0 has not answered for "
                f"{self._dead_seconds:.0f} s: that machine, its launcher or the network between is gone or frozen."
            )
        return self._silent() or self._stalled()

    def _silent(self) -> str | None:
        records = {other: record for other, record in self._records.items() if not record.done}
        silent = [other for other in sorted(records) if self._silence[other] > self._dead_seconds]
        # Ranks that torchrun told to end because another had died fall silent just after it: they are not the cause.
        died = [other for other in silent if not records[other].left]
        reports = []
        for rank, (host, _, place, _, left) in ((other, records[other]) for other in died or silent):
            unseen = f"has died or is frozen: last seen in {place}. If nothing above says why, look for an "
            unseen += f"out-of-memory kill in the kernel log of {host} (dmesg)"
            reports.append(f"rank {rank} ({host}) {left or unseen}")
        return "; ".join(reports) + "." if reports else None

    def _stalled(self) -> str | None:
        ranks = self._records | {self._rank: Heartbeat(self._host, 0, self._place, self._idle)}
        going = {rank: ranks[rank] for rank in sorted(ranks) if not ranks[rank].done}
        if min(record.idle for record in going.values()) <= self._stall_seconds:
            return None
        text = f"no rank has made progress for {self._stall_seconds:.0f} s: "
        if missing := sorted(self._silence.keys() - ranks.keys()):
            return text + f"{_ranks(missing)} never reported."
        places = [record.place for record in going.values()]
        first, last = max(places), min(places)
        behind = [f"rank {rank} ({record.host})" for rank, record in going.items() if record.place == last]
        if first == last:
            text += f"all ({_ranks(going)}) are at the same place, {last}."
        else:
            text += f"{', '.join(behind)} hung in {last}, while the foremost had come to {first}."
        done = sorted(ranks.keys() - going.keys())
        return text + (f" Finished before: {_ranks(done)}." if done else "")


def connect(world_size: int, seconds: float = 60.0) -> dist.Store | None:
    """Open a connection of one's own to the store of the launch; None when there is one rank only.

    Under torchrun the launcher keeps the store. Where rank 0 does (`TORCHELASTIC_USE_AGENT_STORE` is not True), it exists
    once the process group has been initialized: call this afterwards.
    """
    if world_size == 1:
        return None
    # No world size: the server counts the clients that give one, and the process group waits for that count.
    host, port, timeout = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timedelta(seconds=seconds)
    store = dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
    store.set_timeout(timedelta(seconds=STORE_SECONDS))
    # The agent's store outlives a restart of its ranks; what the former ones said must not be read.
    run, restart = (os.environ.get(f"TORCHELASTIC_{name}", "0") for name in ("RUN_ID", "RESTART_COUNT"))
    return dist.PrefixStore(f"watchdog/{run}/{restart}", store)


def _ranks(ranks: Collection[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _is_stopped(pid: int | None) -> bool:
    try:
        return pid is not None and psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    except psutil.Error:
        return False


def _within(seconds: float, call: Callable[[], None]) -> None:
    """Give `call` so much time: a pipe that nobody reads, or a tracking server, may never answer."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
