"""The watchdog: who is to blame is decided rightly, nobody healthy is ended, and real processes end in time."""

import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from vlm_vqa.errors import UserError
from vlm_vqa.training import watchdog as module
from vlm_vqa.training.watchdog import EXIT_ENDED, Heartbeat, Phase, Progress, Watchdog, connect

STALL, DEAD = 60, 10
HERE = Progress(7, Phase.COMPUTING, 1)


DONE = "is done"


class Play:
    """What rank 0 sees of the others, one tick a second, without processes, threads or a store."""

    def __init__(self, others=2, rank=0, hosts=()):
        self.hosts = {other: "a" for other in range(others + 1) if other != rank} | dict(hosts)
        self.judge = Watchdog(dist.HashStore(), rank, others + 1, STALL, dead_seconds=DEAD, tick_seconds=1.0, host="a")
        self.records = {other: Heartbeat(host, 0, HERE, 0.0) for other, host in self.hosts.items()}
        self.beats = itertools.count()

    def change(self, other, **fields):
        self.records[other] = self.records[other]._replace(**fields)

    def run(self, ticks, frozen=(), store=True, moving=True, idle=None):
        """Let time pass until all have to end; `frozen` ranks publish nothing, and nothing is read without a store."""
        for _ in range(ticks):
            for other in self.records.keys() - set(frozen) if store else ():
                self.change(other, tick=self.records[other].tick + 1, idle=(idle or {}).get(other, 0.0))
            if moving:
                self.judge.heartbeat(Phase.COMPUTING, 7 + next(self.beats))
            elif self.judge._place != HERE:
                self.judge.heartbeat(HERE.phase, HERE.step)
            self.judge._count_tick()
            if store:
                self.judge._hear(dict(self.records))
            if reason := self.judge._reason():
                return reason
        return None


def read(text):
    return module._RECORD.validate_json(text)


def test_healthy_ranks_go_on():
    assert Play().run(500) is None


def test_a_record_survives_the_store():
    record = Heartbeat("\u00fcber", 3, Progress(4, Phase.SAVING, 2), 1.5, "was told to end (SIGTERM)")
    decoded = read(module._RECORD.dump_json(record))
    assert decoded == record and decoded.place.phase is Phase.SAVING
    assert str(decoded.place) == "SAVING of step 4, part 2"


def test_a_silent_rank_is_named_with_its_place():
    play = Play(hosts={1: "b"})
    play.change(1, place=Progress(6, Phase.SAVING, 1))
    assert play.run(20) is None
    assert play.run(DEAD, frozen=[1]) is None
    reason = play.run(1, frozen=[1])
    assert reason.startswith("rank 1 (b) has died or is frozen: last seen in SAVING of step 6.")
    assert "rank 2" not in reason


def test_a_rank_that_is_done_is_not_accused():
    play = Play()
    play.run(5)
    play.change(1, left=DONE)
    assert play.run(3 * STALL, frozen=[1], idle={1: 999.0}) is None


def test_ranks_that_were_told_to_end_are_not_the_cause():
    """torchrun ends the others of a machine when one has died: all are silent, one is to blame."""
    play = Play(others=3)
    play.run(5)
    play.change(1, left="was told to end (SIGTERM)")
    reason = play.run(30, frozen=[1, 2])
    assert reason.startswith("rank 2 (a) has died") and "rank 1" not in reason
    alone = Play()
    alone.run(5)
    alone.change(1, left="was told to end (SIGTERM)", tick=99)
    assert alone.run(30, frozen=[1]) == "rank 1 (a) was told to end (SIGTERM)."


def test_the_first_reason_is_everybodys_and_is_said_once_a_machine():
    store = dist.HashStore()
    ranks = [Watchdog(store, rank, 4, STALL, host=host) for rank, host in enumerate("aabb")]
    for rank, watchdog in enumerate(ranks):
        watchdog._end = f"reason of rank {rank}"
    ranks[3]._unwinding_since = time.monotonic()
    for watchdog in (ranks[3], ranks[1], ranks[0], ranks[2]):
        watchdog._agree(store)
        assert watchdog._verdict == watchdog._reason() == "reason of rank 3"
    # Rank 3 shows its own error itself; rank 1 was before rank 0.
    assert [watchdog._speaks for watchdog in ranks[:3]] == [False, True, True]


@pytest.mark.parametrize(
    ("places", "text"),
    [
        ({1: Progress(7, Phase.LOADING, 1), 2: HERE}, "rank 1 (b) hung in LOADING of step 7, while the foremost had "),
        ({1: Progress(7, Phase.UPDATING, 1), 2: Progress(6, Phase.WAITING, 1)}, "rank 2 (a) hung in WAITING of step 6"),
        ({1: Progress(7, Phase.COMPUTING, 2), 2: Progress(7, Phase.COMPUTING, 2)}, "rank 0 (a) hung in COMPUTING of st"),
        ({1: HERE, 2: HERE}, "all (ranks 0, 1, 2) are at the same place, COMPUTING of step 7."),
    ],
)  # fmt: skip
def test_a_stall_names_who_is_behind(places, text):
    play = Play(hosts={1: "b"})
    for other, place in places.items():
        play.change(other, place=place)
    play.run(5)
    assert play.run(STALL - 2, moving=False, idle={1: STALL + 1, 2: STALL + 1}) is None
    reason = play.run(10, moving=False, idle={1: STALL + 1, 2: STALL + 1})
    assert reason.startswith(f"no rank has made progress for {STALL} s: {text}")


def test_no_stall_while_one_rank_makes_progress():
    assert Play().run(3 * STALL, moving=False, idle={1: 3 * STALL}) is None
    assert Play().run(3 * STALL, idle={1: 3 * STALL, 2: 3 * STALL}) is None


def test_a_stall_tells_who_has_finished():
    play = Play()
    play.change(1, left=DONE)
    reason = play.run(3 * STALL, moving=False, frozen=[1], idle={2: 3 * STALL})
    assert reason.endswith("all (ranks 0, 2) are at the same place, COMPUTING of step 7. Finished before: rank 1.")


def test_a_rank_that_never_reports_is_missed():
    play = Play()
    del play.records[2]
    idle = {1: 3 * STALL}
    assert play.run(STALL, moving=False, idle=idle) is None
    assert play.run(3, moving=False, idle=idle) == f"no rank has made progress for {STALL} s: rank 2 never reported."


def test_the_launcher_and_its_store(monkeypatch):
    play = Play()
    play.run(5)
    assert play.run(DEAD, store=False) is None
    assert "store on the machine of rank 0 has not answered for 10 s" in play.run(1, store=False)
    monkeypatch.setattr(play.judge, "_launcher_pid", os.getpid())
    assert play.run(1) == "the launcher of the ranks on a is gone."
    # The store may have gone with rank 0, which had finished.
    other = Play(rank=1)
    other.change(0, left=DONE)
    other.run(1)
    assert other.run(100, store=False) is None


def test_a_short_silence_of_the_store_counts_against_nobody():
    play = Play()
    play.run(5)
    play.run(5, frozen=[1])
    assert play.run(DEAD - 1, store=False) is None
    # The store answers again, and rank 1 needs a moment until it has published.
    assert play.run(2, frozen=[1]) is None
    assert play.run(100) is None


def test_ctrl_z_of_the_launcher_stops_nobody(monkeypatch):
    play = Play()
    play.run(5)
    with monkeypatch.context() as stopped:
        stopped.setattr(module, "_is_stopped", lambda pid: True)
        assert play.run(500, store=False) is None
    assert play.run(DEAD - 1, store=False) is None
    assert play.run(DEAD - 1, frozen=[1, 2]) is None
    assert play.run(100) is None


def test_a_suspended_or_slow_machine_accuses_nobody():
    """The clock of the wall is not looked at: nothing but ticks and answers counts."""
    play = Play()
    play.run(5)
    assert play.run(5, store=False) is None
    assert play.run(DEAD - 1, frozen=[1, 2]) is None
    assert play.run(100, moving=False, idle={1: STALL - 1, 2: STALL - 1}) is None
    # A rank that did not come back is still found.
    assert play.run(DEAD + 3, frozen=[2]).startswith("rank 2 (a) has died or is frozen")


def test_one_rank_needs_no_watchdog(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert connect(1) is None
    threads = module.threading.active_count()
    with Watchdog(None, 0, 1, stall_seconds=1) as watchdog:
        for phase, beats in ((Phase.LOADING, 1), (Phase.COMPUTING, 1), (Phase.COMPUTING, 2)):
            watchdog.heartbeat(phase, 1)
            assert watchdog._place == Progress(1, phase, beats)
        assert module.threading.active_count() == threads


class FlakyStore:
    """A store in which rank 1 has reported and some calls, counted from one, fail with `error`."""

    def __init__(self, error, failing):
        self.error, self.failing, self.calls = error, failing, []
        self.values = {"1": module._RECORD.dump_json(Heartbeat("b", 0, HERE, 0.0))}

    def _call(self, name, result):
        self.calls.append(name)
        if len(self.calls) in self.failing:
            raise self.error
        return result

    def set(self, key, value):
        self._call("set", None)
        self.values[key] = value.encode()

    def check(self, keys):
        return self._call("check", all(key in self.values for key in keys))

    def compare_set(self, key, expected, desired):
        return self._call("compare_set", self.values.setdefault(key, desired.encode()))

    def multi_get(self, keys):
        return self._call("multi_get", [self.values[key] for key in keys])

    def clone(self):
        return self._call("clone", self)


@pytest.fixture
def flaky():
    """Return a function that starts rank 0's watchdog in this process on a flaky store; it is stopped in any case."""

    def start(error, failing):
        store = FlakyStore(error, failing)
        start.started.append(Watchdog(store, 0, 2, stall_seconds=60, tick_seconds=0.02, host="a").__enter__())
        time.sleep(0.3)
        return store

    start.started = []
    yield start
    for watchdog in start.started:
        watchdog.__exit__(None, None, None)


def test_a_transient_error_is_mended_by_a_new_connection(flaky):
    store = flaky(dist.DistNetworkError("broken pipe"), failing={4, 5})
    assert store.calls[:8] == ["set", "check", "check", "multi_get", "clone", "clone", "set", "check"]
    assert not read(store.values["0"]).done


@pytest.mark.parametrize(
    ("error", "left"),
    [
        (SystemExit(128 + signal.SIGTERM), "was told to end (SIGTERM)"),
        (KeyboardInterrupt(), "was interrupted (Ctrl-C)"),
        (SystemExit(0), DONE),
    ],
)
def test_leaving_without_an_error_says_how(flaky, error, left):
    store = flaky(None, failing=())
    flaky.started[0].__exit__(type(error), error, None)
    time.sleep(0.1)
    assert read(store.values["0"]).left == left and "end" not in store.values


def test_a_rank_that_hangs_in_its_own_end_is_ended(flaky, monkeypatch, capsys):
    flaky(None, failing=())
    watchdog, codes, reasons = flaky.started[0], [], []
    for name in ("UNWIND_SECONDS", "ON_END_SECONDS"):
        monkeypatch.setattr(module, name, 0.1)
    monkeypatch.setattr(module.os, "_exit", lambda code: (codes.append(code), watchdog._stopping.set()))
    # A tracking server that does not answer must not keep it either.
    watchdog.on_end = lambda reason: (reasons.append(reason), time.sleep(60))
    watchdog.__exit__(UserError, UserError("the disk is full."), None)
    time.sleep(0.5)
    assert codes == [EXIT_ENDED] and reasons == ["rank 0 (a) was about to end, and did not within 0 s."]
    assert "watchdog of rank 0: rank 0 (a) was about to end" in capsys.readouterr().err


# Real processes, forked from one that has imported torch.

TICK, DEAD_REAL, STALL_REAL = 0.1, 1.5, 1.0
# On a machine that does other things as well.
SLACK = 6


def serve(port):
    # The server lives as long as the object that started it.
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port.value = server.port
    time.sleep(60)


def run_rank(rank, world_size, port, folder, task, stall_seconds):
    """Be one rank: begin, do `task`, and end as it ends."""
    errors = os.open(folder / f"{rank}.err", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(errors, 2)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    watchdog = Watchdog(
        connect(world_size),
        rank,
        world_size,
        stall_seconds,
        dead_seconds=DEAD_REAL,
        tick_seconds=TICK,
        on_end=lambda reason: (folder / f"{rank}.ended").write_text(reason),
        host="local",
    )
    with watchdog:
        while len(watchdog._records) < world_size - 1:
            time.sleep(TICK)
        TASKS[task](watchdog, folder)


def wait_as_in_a_collective(watchdog, folder):
    watchdog.heartbeat(Phase.COMPUTING, 3)
    store = connect(2)
    eventually(lambda: read(store.get(str(watchdog._rank))).place.step == 3)
    (folder / f"{watchdog._rank}.up").touch()
    # No signal and no exception gets in here, as in a collective.
    store.set_timeout(timedelta(seconds=60))
    store.get("never")


def hang_in_loading(watchdog, folder):
    watchdog.heartbeat(Phase.LOADING, 3)
    time.sleep(60)


def finish(watchdog, folder):
    watchdog.heartbeat(Phase.WAITING, 3)


def raise_error(watchdog, folder):
    watchdog.heartbeat(Phase.LOADING, 3)
    time.sleep(3 * TICK)
    raise UserError("row 17 of train.parquet: no such image.")


def reduce_for_ever(watchdog, folder):
    """Real collectives: gloo raises an error in every rank when one has died."""
    watchdog.heartbeat(Phase.COMPUTING, 3)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    dist.init_process_group("gloo", rank=watchdog._rank, world_size=2)
    while True:
        dist.barrier()
        (folder / f"{watchdog._rank}.up").touch()


TASKS = {
    task.__name__: task for task in (wait_as_in_a_collective, hang_in_loading, finish, raise_error, reduce_for_ever)
}


class Ranks:
    """Some ranks on a store of their own, one for each task, and what became of them."""

    def __init__(self, context, folder, tasks, stall_seconds=60.0):
        self.context, self.folder = context, folder
        folder.mkdir()
        port = context.Value("i", 0)
        self.server = self.begin(serve, port)
        eventually(lambda: port.value)
        self.port = port.value
        self.processes = [
            self.begin(run_rank, rank, len(tasks), self.port, folder, task.__name__, stall_seconds)
            for rank, task in enumerate(tasks)
        ]

    def begin(self, function, *args):
        process = self.context.Process(target=function, args=args, daemon=True)
        process.start()
        return process

    def wait_until_up(self, *ranks):
        eventually(lambda: all((self.folder / f"{rank}.up").exists() for rank in ranks))

    def exit_codes(self, ranks, within):
        deadline = time.monotonic() + within + SLACK
        for rank in ranks:
            self.processes[rank].join(max(0.0, deadline - time.monotonic()))
        return {rank: self.processes[rank].exitcode for rank in ranks}

    def printed(self):
        return "".join(file.read_text() for file in sorted(self.folder.glob("*.err")))


def eventually(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the processes did not get ready"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def context():
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["torch.distributed", "vlm_vqa.training.watchdog"])
    return made


@pytest.fixture
def start(context, tmp_path):
    """Return a function that starts a rank for each task; all that is left of them is killed afterwards."""
    started = []

    def start(*tasks, **options):
        started.append(Ranks(context, tmp_path / str(len(started)), tasks, **options))
        return started[-1]

    yield start
    for process in (process for ranks in started for process in (ranks.server, *ranks.processes)):
        process.kill()
        process.join()


def test_a_dead_or_frozen_rank_ends_the_others_but_not_one_that_has_finished(start):
    tasks = (finish, wait_as_in_a_collective, wait_as_in_a_collective)
    killed, stopped = start(*tasks), start(*tasks)
    for ranks, sent in ((killed, signal.SIGKILL), (stopped, signal.SIGSTOP)):
        ranks.wait_until_up(1, 2)
        assert ranks.exit_codes([0], 1) == {0: 0}
        os.kill(ranks.processes[2].pid, sent)
    for ranks in (killed, stopped):
        assert ranks.exit_codes([1], DEAD_REAL + 8 * TICK) == {1: EXIT_ENDED}
        reason = "rank 2 (local) has died or is frozen: last seen in COMPUTING of step 3"
        assert reason in ranks.printed() and "rank 0 (" not in ranks.printed()
        assert (ranks.folder / "1.ended").read_text().startswith(reason)
    # A frozen one ends as soon as it goes on.
    os.kill(stopped.processes[2].pid, signal.SIGCONT)
    assert stopped.exit_codes([2], 8 * TICK) == {2: EXIT_ENDED}


def test_a_hang_in_loading_is_named_by_all_ranks(start):
    ranks = start(wait_as_in_a_collective, hang_in_loading, wait_as_in_a_collective, stall_seconds=STALL_REAL)
    assert ranks.exit_codes([0, 1, 2], STALL_REAL + 8 * TICK) == dict.fromkeys([0, 1, 2], EXIT_ENDED)
    assert "rank 1 (local) hung in LOADING of step 3, while the foremost had come to COMPUTING" in ranks.printed()


def test_an_error_ends_the_others_which_quote_it(start):
    ranks = start(wait_as_in_a_collective, raise_error, wait_as_in_a_collective)
    assert ranks.exit_codes([0, 1, 2], 8 * TICK) == {0: EXIT_ENDED, 1: 1, 2: EXIT_ENDED}
    assert "rank 1 (local) stopped: row 17 of train.parquet: no such image." in ranks.printed()
    # The rank itself shows its own error, and the machine reads the line once.
    assert "Traceback" in (ranks.folder / "1.err").read_text() and ranks.printed().count("watchdog of rank") == 1


def test_what_gloo_says_about_a_dead_rank_is_not_taken_for_the_cause(start):
    ranks = start(reduce_for_ever, reduce_for_ever)
    ranks.wait_until_up(0, 1)
    ranks.processes[1].kill()
    assert ranks.exit_codes([0], DEAD_REAL + 8 * TICK) == {0: EXIT_ENDED}
    assert "rank 1 (local) has died" in ranks.printed()


def test_ranks_end_when_their_store_is_gone_or_frozen(start):
    """A client of a frozen server waits in C++ for as long as it is frozen, one of a dead server fails at once."""
    gone, frozen = (start(wait_as_in_a_collective, wait_as_in_a_collective) for _ in range(2))
    for ranks, sent in ((gone, signal.SIGKILL), (frozen, signal.SIGSTOP)):
        ranks.wait_until_up(0, 1)
        os.kill(ranks.server.pid, sent)
    for ranks in (gone, frozen):
        assert ranks.exit_codes([0, 1], DEAD_REAL + 8 * TICK) == {0: EXIT_ENDED, 1: EXIT_ENDED}
        assert "the launcher's store on the machine of rank 0 has not answered" in ranks.printed()


def launch_and_die(port, folder):
    os.environ["TORCHELASTIC_RUN_ID"] = "none"
    for rank in range(2):
        if os.fork() == 0:
            run_rank(rank, 2, port, folder, "wait_as_in_a_collective", 60.0)
    eventually(lambda: all((folder / f"{rank}.up").exists() for rank in range(2)))
    os.kill(os.getpid(), signal.SIGKILL)


def test_ranks_end_when_their_launcher_is_gone(start):
    ranks = start()
    ranks.begin(launch_and_die, ranks.port, ranks.folder)
    eventually(lambda: all((ranks.folder / f"{rank}.ended").exists() for rank in range(2)))
    assert re.search(r"watchdog of rank [01]: the launcher of the ranks on local is gone\.", ranks.printed())


def test_the_state_of_a_launcher(request):
    assert not module._is_stopped(None) and not module._is_stopped(os.getppid())
    launcher = subprocess.Popen(["sleep", "60"])
    request.addfinalizer(launcher.wait)
    request.addfinalizer(launcher.kill)
    launcher.send_signal(signal.SIGSTOP)
    eventually(lambda: module._is_stopped(launcher.pid))
    launcher.send_signal(signal.SIGCONT)
    eventually(lambda: not module._is_stopped(launcher.pid))
