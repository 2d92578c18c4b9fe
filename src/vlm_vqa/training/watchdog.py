"""A rank that dies, hangs or raises an error ends all ranks, and is named.

Nothing else does that: a collective waits for half an hour, and torchrun sees only the processes of its own machine.
So every rank tells the others once a tick, through the launcher's store, that it runs and how far it has come.

What happens to one rank, and when the last of the others has ended (t = `tick_seconds`, 1; d = `dead_seconds`, 10):

    it raises an error                                     8t + 8 s
    it dies, is frozen, or its machine is gone         d + 8t + 8 s
    the store's machine, or launcher, is gone          d + 8t + 8 s
    it hangs while its threads run         stall_seconds + 8t + 8 s after the last heartbeat of any rank

The 8 s are there for printing (1), telling the others (2) and `on_end` (5); commonly it takes d + 2 s in all. Time
counts only while a rank runs and the store answers it: on a machine that is overloaded or was suspended, all of this
takes longer, and no rank is blamed for it. A rank that raised an error has `UNWIND_SECONDS` to end by itself. A frozen
one cannot: its launcher kills it 30 s after another rank of its machine has ended, or it ends soon after it goes on.

A thread cannot run while C code holds the GIL: parsing a JSON file of gigabytes looks frozen. (Collectives, torch's and
safetensors' loading and saving let it go.)
"""

import atexit
import enum
import itertools
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import NamedTuple, Self

import psutil
import torch.distributed as dist

from vlm_vqa.errors import UserError

# sysexits.h's "temporary failure, try again": not 1 (a traceback) and not 2 (a user's mistake), whose cause this rank has.
EXIT_ENDED = 75
TICK_SECONDS = 1.0
DEAD_SECONDS = 10.0
# Between a rank's own error and its forced end: its traceback, its MLflow run and its files come first.
UNWIND_SECONDS = 30.0
PRINT_SECONDS, TELL_SECONDS, ON_END_SECONDS = 1.0, 2.0, 5.0
STORE_SECONDS = 5.0
_NEXT_STEP = "Mend that, then run `dvc repro` again: it goes on from the last checkpoint."

logger = logging.getLogger(__name__)


class Phase(enum.IntEnum):
    """The phases of a step, in their order: of two ranks in one step, the one in the lower phase is behind."""

    STARTING = 0
    LOADING = 1
    COUNTING = 2
    COMPUTING = 3
    UPDATING = 4
    VALIDATING = 5
    SAVING = 6
    # At a barrier, with nothing left to do: whoever is still busy keeps the others waiting.
    WAITING = 7


class Progress(NamedTuple):
    """How far a rank has come; ordered. `beats` counts within one phase of one step, e.g. forward passes."""

    step: int
    phase: Phase
    beats: int

    def __str__(self) -> str:
        return f"{self.phase.name} of step {self.step}" + (f", part {self.beats}" if self.beats > 1 else "")


class Heartbeat(NamedTuple):
    """What a rank tells the others."""

    host: str
    tick: int  # Changes as long as the process runs, whatever its main thread does.
    place: Progress
    idle: float  # Seconds since the last heartbeat, by the rank's own clock: those of two machines are never compared.
    done: bool = False
    left: str = ""  # It was told to end; the cause is elsewhere.
    end: str = ""  # Why all ranks have to end.
    said: bool = False  # `end` has been printed on `host`.

    def encode(self) -> str:
        return json.dumps(self)

    @classmethod
    def decode(cls, text: bytes) -> Self:
        host, tick, (step, phase, beats), *rest = json.loads(text)
        return cls(host, tick, Progress(step, Phase(phase), beats), *rest)


class Launcher(enum.Enum):
    """The state of the process that started this rank."""

    RUNS = enum.auto()
    STOPPED = enum.auto()
    GONE = enum.auto()


class Diagnosis(NamedTuple):
    """Why all ranks end, and whether another rank has printed it on this machine."""

    reason: str
    said: bool = False


class FailureDetector:
    """Decides from the ranks' records whether all have to end. No threads, no store, no clock of its own.

    Two clocks, for what must not count against anybody: `_clock` runs while this process does, and `_heard`, by which
    the others' silence is measured, only while the store answers as well.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        host: str,
        now: float,
        stall_seconds: float,
        dead_seconds: float = DEAD_SECONDS,
        tick_seconds: float = TICK_SECONDS,
    ):
        self._rank, self._host = rank, host
        self._stall_seconds, self._dead_seconds, self._tick_seconds = stall_seconds, dead_seconds, tick_seconds
        self._records: dict[int, Heartbeat] = {}
        self._clock, self._now = 0.0, now
        self._heard, self._taken = 0.0, now
        self._answered = 0.0
        self._changed = {other: 0.0 for other in range(world_size) if other != rank}
        self._place, self._moved = Progress(0, Phase.STARTING, 0), 0.0
        self._found: float | None = None

    @property
    def idle(self) -> float:
        """Seconds in which this rank ran without a heartbeat."""
        return self._clock - self._moved

    @property
    def is_heard(self) -> bool:
        """Whether the store answers this rank."""
        return self._clock - self._answered <= self._dead_seconds

    def advance(self, now: float, place: Progress) -> None:
        """Note the time and this rank's own place; called every tick."""
        # A tick that comes late says that this process did not run, not that the others did nothing.
        self._clock += min(now - self._now, 2 * self._tick_seconds)
        self._now = now
        if place != self._place:
            self._place, self._moved = place, self._clock

    def take(self, now: float, records: dict[int, Heartbeat]) -> None:
        """Note what the store has answered: the records of all other ranks that have reported so far."""
        waited = now - self._taken
        if waited > self._dead_seconds:
            # This process was suspended, or nobody could publish: everybody gets the whole time anew.
            self._changed = dict.fromkeys(self._changed, self._heard)
        else:
            self._heard += min(waited, 2 * self._tick_seconds)
        for other, record in records.items():
            if other not in self._records or self._records[other].tick != record.tick:
                self._changed[other] = self._heard
        self._records, self._taken, self._answered = records, now, self._clock

    def diagnosis(self, launcher: Launcher) -> Diagnosis | None:
        """Say why all ranks end, or None: they do not, or another rank of this machine is about to say it."""
        found = self._cause(launcher)
        if found is None:
            self._found = None
            return None
        if self._found is None:
            self._found = self._clock
        # A rank that posted its own error shall end first: then torchrun, too, calls it the root cause.
        patience = 2 if any(record.end and not record.said for record in self._records.values()) else 0
        # One line a machine: the others wait for the first, but not for ever, as it may be ending for its own reason.
        patience += 0 if self._is_first_here() else 3
        waited = self._clock - self._found
        return found if found.said or waited >= patience * self._tick_seconds else None

    def _is_first_here(self) -> bool:
        return not any(
            other < self._rank and self._is_living(other) and record.host == self._host
            for other, record in self._records.items()
        )

    def _cause(self, launcher: Launcher) -> Diagnosis | None:
        told = self._reported()
        if told is not None:
            return told
        if launcher is Launcher.GONE:
            return Diagnosis(f"the launcher of the ranks on {self._host} is gone.")
        reason = self._lost_store(launcher) or self._silent() or self._missing() or self._stalled()
        return Diagnosis(reason) if reason else None

    def _reported(self) -> Diagnosis | None:
        ends = [record for _, record in sorted(self._records.items()) if record.end]
        said = [record for record in ends if record.said and record.host == self._host]
        return next((Diagnosis(record.end, said=bool(said)) for record in said or ends), None)

    def _lost_store(self, launcher: Launcher) -> str | None:
        if launcher is Launcher.STOPPED:
            # Ctrl-Z stops torchrun, which keeps the store, but not the ranks. When it goes on, it needs its time.
            self._answered = self._clock
        # Where rank 0 keeps the store itself, it takes it along when it has finished.
        if self.is_heard or (0 in self._records and self._records[0].done):
            return None
        return (
            "the launcher's store on the machine of rank 0 has not answered for "
            f"{self._dead_seconds:.0f} s: that machine, its launcher or the network between is gone or frozen."
        )

    def _is_living(self, other: int) -> bool:
        record = self._records[other]
        return not record.done and not record.end and self._silence(other) <= self._dead_seconds

    def _silence(self, other: int) -> float:
        return self._heard - self._changed[other]

    def _silent(self) -> str | None:
        going = [other for other, record in self._records.items() if not record.done]
        silent = [other for other in going if self._silence(other) > self._dead_seconds]
        # Ranks that torchrun told to end because another had died fall silent just after it: they are not the cause.
        died = [other for other in silent if not self._records[other].left]
        if not silent:
            return None
        return "; ".join(self._death_report(other) for other in sorted(died or silent)) + "."

    def _death_report(self, other: int) -> str:
        record = self._records[other]
        if record.left:
            return f"rank {other} ({record.host}) {record.left}"
        return (
            f"rank {other} ({record.host}) has died or is frozen: last seen in {record.place}. If nothing above says why, "
            f"look for an out-of-memory kill in the kernel log of {record.host} (dmesg)"
        )

    def _missing(self) -> str | None:
        missing = sorted(self._changed.keys() - self._records.keys())
        if not missing or self._heard <= self._stall_seconds:
            return None
        return f"{_ranks(missing)} did not report within {self._stall_seconds:.0f} s after rank {self._rank} did."

    def _stalled(self) -> str | None:
        living = {other: self._records[other] for other in self._records if self._is_living(other)}
        if min([self.idle, *(record.idle for record in living.values())]) <= self._stall_seconds:
            return None
        places = {self._rank: self._place, **{other: record.place for other, record in living.items()}}
        hosts = {self._rank: self._host, **{other: record.host for other, record in living.items()}}
        first, last = max(places.values()), min(places.values())
        text = f"no rank has made progress for {self._stall_seconds:.0f} s: "
        if first == last:
            text += f"all ({_ranks(sorted(places))}) are at the same place, {last}."
        else:
            behind = [f"rank {other} ({hosts[other]})" for other in sorted(places) if places[other] == last]
            text += f"{', '.join(behind)} hung in {last}, while the foremost had come to {first}."
        done = sorted(other for other, record in self._records.items() if record.done)
        return text + (f" Finished before: {_ranks(done)}." if done else "")


class Watchdog:
    """Watches over the ranks of one training; used by the main thread of each, and inert when there is only one.

        with Watchdog(connect(world_size), rank, world_size, stall_seconds=600) as watchdog:
            watchdog.heartbeat(Phase.LOADING, step)

    Leaving the block tells the others how: done, told to end (SIGTERM, Ctrl-C), or the error, which ends them.

    Args:
        store: this rank's own connection (see `connect`): a client that waits for an answer serves nobody else.
        stall_seconds: longer than any healthy pause between two beats: the model's loading, a first compilation, a
            checkpoint's writing.
        on_end: called with the reason before this rank is ended, in a thread of its own and for at most
            `ON_END_SECONDS`.
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
        self._store, self._rank, self._world_size = store, rank, world_size
        self._host = host or socket.gethostname()
        self._dead_seconds, self._tick_seconds, self.on_end = dead_seconds, tick_seconds, on_end
        self._judge = FailureDetector(
            rank, world_size, self._host, time.monotonic(), stall_seconds, dead_seconds, tick_seconds
        )
        self._place = Progress(0, Phase.STARTING, 0)
        self._left, self._end, self._said = "", "", False
        self._ending_since: float | None = None
        self._answer: dict[int, Heartbeat] | None = None
        self._ticks = itertools.count()
        self._started = False
        self._stopping, self._ceasing = threading.Event(), threading.Event()
        self._wake, self._last_word = threading.Event(), threading.Event()
        # Elsewhere a parent that ends first means nothing: a shell script may start ranks and go.
        self._launcher_pid = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def start(self) -> Self:
        """Begin to watch. Every rank has to do so within `stall_seconds`."""
        if self._world_size > 1:
            self._started = True
            atexit.register(self._cease)
            # Two threads: most calls to a store whose server is frozen return only when it goes on, whatever their
            # timeout. The one that judges must not wait with them.
            self._talker, watcher = (
                threading.Thread(target=self._guarded, args=(loop,), name="watchdog", daemon=True)
                for loop in (self._publish, self._watch)
            )
            self._talker.start()
            watcher.start()
        return self

    def stop(self) -> None:
        """Tell the others that this rank is done, and cease to watch."""
        if self._started:
            self._stopping.set()
            self._publish_once()

    def heartbeat(self, phase: Phase, step: int) -> None:
        """Say that this rank now begins `phase` of `step`, or the next part of it; as often on every rank."""
        before = self._place
        same = before.step == step and before.phase == phase
        # One assignment: the other threads see the old place or the new one.
        self._place = Progress(step, phase, before.beats + 1 if same else 1)

    def fail(self, message: str) -> None:
        """End the other ranks, which quote `message`. This one then has `UNWIND_SECONDS` to end by itself."""
        if self._started and not self._end:
            self._ending_since = time.monotonic()
            self._end = f"rank {self._rank} ({self._host}) stopped: {message}"
            self._publish_once()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        told = _told_to_end(error)
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self.stop()
        elif told:
            # The threads go on: should this rank not come to its end, or another be dead, they will say so.
            self._left = told
            self._wake.set()
        else:
            if self._started and _is_lost_connection(error):
                # Another rank's end came first. This one's thread names it and does not come back from that.
                time.sleep(self._dead_seconds + 8 * self._tick_seconds + PRINT_SECONDS + TELL_SECONDS + ON_END_SECONDS)
            self.fail(str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")

    def _cease(self) -> None:
        # Python kills threads that come back from C++ while it shuts down, and torch answers that with SIGABRT.
        self._ceasing.set()
        self._ending_since = self._ending_since or time.monotonic()
        self._wake.set()
        self._talker.join(TELL_SECONDS)

    def _publish_once(self) -> None:
        self._wake.set()
        self._last_word.wait(TELL_SECONDS)

    def _guarded(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except Exception:
            # A defect in here must not cost a healthy training.
            logger.exception("rank %d: the watchdog has a defect and watches no longer; training goes on", self._rank)
            self._stopping.set()
            self._last_word.set()
            # The others must not take this rank's silence for its death.
            with suppress(Exception):
                assert self._store is not None
                self._store.set(str(self._rank), self._heartbeat().encode())

    def _publish(self) -> None:
        """Publish this rank's record and read the others', once a tick, until this rank has published its end."""
        unknown = set(range(self._world_size)) - {self._rank}
        connected, store = True, self._store
        assert store is not None, "a rank alone has nobody to tell"
        while True:
            record = self._heartbeat()
            try:
                # A client whose connection broke never mends it.
                self._store = store = store if connected else store.clone()
                store.set(str(self._rank), record.encode())
                # multi_get would wait for a rank that has not reported yet.
                unknown = {other for other in unknown if not store.check([str(other)])}
                known = [other for other in range(self._world_size) if other != self._rank and other not in unknown]
                values = store.multi_get([str(other) for other in known])
            except RuntimeError:
                # The base of all that torch's stores raise. How long this may last is the judge's matter.
                connected = False
            else:
                connected = True
                self._answer = {other: Heartbeat.decode(value) for other, value in zip(known, values, strict=True)}
                if record.done or record.end:
                    self._last_word.set()
            if record.done or self._ceasing.is_set():
                return
            self._wake.wait(self._tick_seconds)
            self._wake.clear()

    def _heartbeat(self) -> Heartbeat:
        done = self._stopping.is_set() and not self._end
        return Heartbeat(
            self._host, next(self._ticks), self._place, self._judge.idle, done, self._left, self._end, self._said
        )

    def _watch(self) -> None:
        taken = None
        while not self._stopping.wait(self._tick_seconds):
            now = time.monotonic()
            self._judge.advance(now, self._place)
            answer = self._answer
            if answer is not None and answer is not taken:
                self._judge.take(now, answer)
                taken = answer
            diagnosis = self._diagnosis(now)
            if diagnosis is not None:
                self._finish(diagnosis)

    def _diagnosis(self, now: float) -> Diagnosis | None:
        if self._ending_since is None:
            return self._judge.diagnosis(_launcher(self._launcher_pid))
        if now - self._ending_since > UNWIND_SECONDS:
            return Diagnosis(
                f"rank {self._rank} ({self._host}) was about to end, and did not within {UNWIND_SECONDS:.0f} s."
            )
        return None

    def _finish(self, diagnosis: Diagnosis) -> None:
        """End this process, whatever its main thread does: no signal interrupts a collective."""
        if not diagnosis.said:
            line = f"\nwatchdog of rank {self._rank}: {diagnosis.reason} All ranks end now. {_NEXT_STEP}\n"
            _within(PRINT_SECONDS, lambda: print(line, end="", file=sys.stderr, flush=True))
        # In this order: the other thread may publish in between.
        self._said = True
        self._end = diagnosis.reason
        if self._judge.is_heard:
            self._publish_once()
        if (on_end := self.on_end) is not None:
            _within(ON_END_SECONDS, lambda: on_end(diagnosis.reason))
        os._exit(EXIT_ENDED)


def connect(world_size: int, seconds: float = 60.0) -> dist.Store | None:
    """Open a connection of one's own to the store of the launch; None when there is one rank only.

    Under torchrun the launcher keeps the store. Where rank 0 does (`TORCHELASTIC_USE_AGENT_STORE` is not True), it exists
    once the process group has been initialized: call this afterwards.

    Raises:
        UserError: this process was not started by a launcher.
    """
    if world_size == 1:
        return None
    missing = {"MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()
    if missing:
        raise UserError(
            f"{' and '.join(sorted(missing))} not set: start several processes with "
            "`accelerate launch --config_file launch/NAME.yaml stages/train.py`."
        )
    # No world size: the server counts the clients that give one, and the process group waits for that count.
    host, port, timeout = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timedelta(seconds=seconds)
    store = dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
    store.set_timeout(timedelta(seconds=STORE_SECONDS))
    # The agent's store outlives a restart of its ranks; what the former ones said must not be read.
    run, restart = (os.environ.get(f"TORCHELASTIC_{name}", "0") for name in ("RUN_ID", "RESTART_COUNT"))
    return dist.PrefixStore(f"watchdog/{run}/{restart}", store)


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _launcher(pid: int | None) -> Launcher:
    if pid is None:
        return Launcher.RUNS
    if os.getppid() != pid:
        return Launcher.GONE
    try:
        stopped = psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    except psutil.Error:
        return Launcher.RUNS
    return Launcher.STOPPED if stopped else Launcher.RUNS


def _told_to_end(error: BaseException | None) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "was interrupted (Ctrl-C)"
    if isinstance(error, SystemExit) and error.code == 128 + signal.SIGTERM:
        return "was told to end (SIGTERM)"
    return ""


def _is_lost_connection(error: BaseException) -> bool:
    # NCCL and the store have exceptions of their own; gloo's is a RuntimeError with the place in its source.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


def _within(seconds: float, call: Callable[[], None]) -> None:
    """Give `call` so much time: a pipe that nobody reads, or a tracking server, may never answer."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
