"""A training that is killed, at any moment, one process or all, ends with the bytes of one that was left alone.

    python -m proofs.kills [--kills 20] [--launches cpu cpu-ddp cpu-fsdp2] [--seed 0]

For each launch and optimizer the train stage runs undisturbed, in a temporary copy of the project, on the sample of VQAv2,
real or drawn (see `benchmarks.vqav2`). Then it is started, killed by SIGKILL, started again, killed again, and at last left
to finish. Everything in models/trained, reports/train.json and reports/train_curve.csv must be the undisturbed run's. Kills
hit

    start-up         at a random moment before the first step
    a step           at a random moment of a random step
    mid-checkpoint   while a checkpoint is written, before the victim has sealed its part of it
    the end          after the last step, while models/trained is written

About 10 minutes on 2 busy cores.
"""

import argparse
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Self

import psutil

from benchmarks import measure, vqav2
from benchmarks.measure import Claim
from proofs.project import Project, sample_params
from vlm_vqa.errors import UserError
from vlm_vqa.hashing import sha256_file
from vlm_vqa.params import load_params
from vlm_vqa.training import checkpoint_files
from vlm_vqa.training.launch import read_launch

LAUNCHES = ("cpu", "cpu-ddp", "cpu-fsdp2")
OPTIMIZERS = {
    "adamw_torch": {"train.optimizer": "adamw_torch", "train.percentile_clipping": 100},
    "adamw_bnb_8bit": {"train.optimizer": "adamw_bnb_8bit", "train.percentile_clipping": 95},
}
QUESTIONS_A_STEP, ACCUMULATION = 8, 2
# Whatever a resumed run could lose shows in its weights or reports: dropout draws random numbers, epochs draw other answers,
# the logged loss is a mean that begins before a checkpoint and ends after it, most matrices have 8-bit states.
SETTINGS = {
    "language.config.hidden_size": 64,
    "language.config.intermediate_size": 128,
    "language.config.num_hidden_layers": 2,
    "prompt.text_length": 192,
    "train.gradient_accumulation_steps": ACCUMULATION,
    "train.num_train_epochs": 4,
    "train.answers": "drawn",
    "train.dropout": 0.1,
    "train.save_steps": 5,
    "train.logging_steps": 3,
}
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


class Moment(Enum):
    """Where a kill hits."""

    START = "start-up"
    STEP = "a step"
    CHECKPOINT = "mid-checkpoint"
    END = "the end"


@dataclass(frozen=True)
class Plan:
    """One kill: when, and of whom."""

    moment: Moment
    step: int
    """STEP, CHECKPOINT: the first one at which it may hit."""
    delay: float
    """START: the share of the start-up that goes before it. STEP: seconds from the end of `step`."""
    everyone: bool
    """All processes, the launcher too; else one rank."""


@dataclass(frozen=True)
class Kill:
    """What a kill has hit."""

    launch: str
    optimizer: str
    moment: str
    where: str
    victim: str
    seconds: float
    """From the kill to the end of the last process."""
    goes_on_from: str


@dataclass(frozen=True)
class Result:
    """A training killed again and again, and the files in which it differs from the undisturbed one."""

    launch: str
    optimizer: str
    kills: list[Kill]
    differing: list[str]


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
            UserError: the training has ended before, or it takes too long.
        """
        deadline = time.monotonic() + PATIENCE
        while not (found := condition()):
            if self.launcher.poll() is not None or time.monotonic() > deadline:
                raise UserError(
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
                    one
                    for one in range(self.world)
                    if not (path / checkpoint_files.seal_file(one, self.world)).exists()
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
            UserError: it failed.
        """
        if self.launcher.wait(timeout=PATIENCE) != 0:
            raise UserError(f"the train stage failed:\n{self.text()[-3000:]}")


def processes_of(project: Project) -> int:
    """Return how many processes train."""
    launch = load_params(project.folder / "params.yaml").train.launch
    return read_launch(launch, project.folder / "launch")["num_processes"]


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Kill, compare, and write `kills.json`."""
    parser = measure.parser("kills", __doc__, "proofs", kills=20)
    parser.add_argument("--launches", nargs="+", choices=LAUNCHES, default=LAUNCHES)
    parser.add_argument("--seed", type=int, default=0)
    options = measure.parse(parser, arguments)
    pairs = [(launch, optimizer) for launch in options.launches for optimizer in OPTIMIZERS]
    with tempfile.TemporaryDirectory(prefix="kills-") as folder, vqav2.sample() as sample:
        project = prepare(Path(folder).resolve(), sample.parent)
        results = []
        for number, (launch, optimizer) in enumerate(pairs):
            count = options.kills // len(pairs) + (number < options.kills % len(pairs))
            if count:
                rng = random.Random(f"{options.seed} {launch} {optimizer}")
                results.append(survive(project, launch, optimizer, kinds(number, count, rng), rng))
    report(results, options)


def prepare(folder: Path, shared_data: Path) -> Project:
    """Return a copy of the project in which the first two stages have run."""
    project = Project(folder, {**sample_params(shared_data), **SETTINGS})
    for stage in ("fetch-vqav2", "extract-features"):
        done = project.stage(stage, **ENVIRONMENT)
        if done.returncode:
            raise UserError(f"stage {stage} failed:\n{done.stderr[-3000:]}")
    return project


# Of whom a kill is: one rank (False) or everyone (True).
RARER = ((Moment.START, False), (Moment.END, True), (Moment.START, True), (Moment.END, False))


def kinds(number: int, count: int, rng: random.Random) -> list[tuple[Moment, bool]]:
    """Choose moments and victims of `count` kills so that pairs `number` 0, 1, ... together have all of them."""
    chosen = [(Moment.STEP, number % 2 == 1), (Moment.CHECKPOINT, number % 2 == 0)]
    chosen += [RARER[(number + extra) % len(RARER)] for extra in range(2)]
    chosen += [(rng.choice(list(Moment)), rng.random() < 0.5) for _ in range(count - 4)]
    chosen = chosen[:count]
    rng.shuffle(chosen)
    # After the last step there are none left.
    return sorted(chosen, key=lambda kind: kind[0] is Moment.END)


def survive(
    project: Project, launch: str, optimizer: str, chosen: list[tuple[Moment, bool]], rng: random.Random
) -> Result:
    """Train once undisturbed, once with kills, and compare."""
    project.set({"train.launch": launch, **OPTIMIZERS[optimizer]})
    processes = processes_of(project)
    project.set({"train.batch_size": QUESTIONS_A_STEP // processes // ACCUMULATION})
    clear(project)
    with Training(project) as training:
        training.wait_for(lambda: training.step() is not None, "the first step")
        start_up = time.monotonic() - training.started
        training.finish()
        steps = training.step()
        seconds = (time.monotonic() - training.started - start_up) / steps
    undisturbed = outcome(project)
    print(f"{launch}, {optimizer}: {steps} steps, {start_up:.0f} s start-up, {seconds:.2g} s a step", flush=True)

    clear(project)
    # One that is caught late has later checkpoints and steps to hit.
    targets = iter(sorted(rng.randrange(1, steps - 15) for _ in chosen))
    kills: list[Kill] = []
    for number, (moment, everyone) in enumerate(chosen, 1):
        delay = rng.uniform(0, start_up if moment is Moment.START else seconds)
        plan = Plan(moment, next(targets), delay, everyone)
        rank = None if everyone else rng.randrange(processes)
        with Training(project) as training:
            kills.append(hit(training, plan, rank, launch, optimizer))
            check_resumed(training, kills[-2].goes_on_from if len(kills) > 1 else "the start")
        print(f"  kill {number}/{len(chosen)}  {line(kills[-1])}", flush=True)
    with Training(project) as training:
        training.finish()
        check_resumed(training, kills[-1].goes_on_from)
    found = outcome(project)
    differing = sorted(name for name in undisturbed | found if undisturbed.get(name) != found.get(name))
    print(f"  the same bytes: {'no: ' + ', '.join(differing) if differing else 'yes'}", flush=True)
    return Result(launch, optimizer, kills, differing)


def hit(training: Training, plan: Plan, rank: int | None, launch: str, optimizer: str) -> Kill:
    """Wait for the planned moment and kill."""
    if plan.moment is Moment.START:
        training.wait_for(lambda: len(training.ranks()) == training.world, "all ranks were started")
        late = training.started + plan.delay - time.monotonic()
        deadline = time.monotonic() + max(0.0, late)
        training.wait_for(lambda: time.monotonic() > deadline or training.step() is not None, "the planned moment")
        where = f"{time.monotonic() - training.started:.1f} s after the launch"
    elif plan.moment is Moment.STEP:
        training.wait_for(lambda: (training.step() or 0) >= plan.step, f"step {plan.step}")
        time.sleep(plan.delay)
        where = f"after step {training.step()}"
    elif plan.moment is Moment.CHECKPOINT:
        where = f"{training.freeze_in_checkpoint(plan.step, rank).name} half written"
    else:
        training.wait_for((training.folder / "models/trained").is_dir, "models/trained was being written")
        # The other ranks have nothing left to do.
        rank = None if rank is None else 0
        where = "models/trained half written"
    seconds = training.kill(rank)
    whole = training.whole()
    return Kill(launch, optimizer, plan.moment.value, where, "all" if rank is None else f"rank {rank}",
                round(seconds, 2), whole[0].name if whole else "the start")  # fmt: skip


def check_resumed(training: Training, expected: str) -> None:
    """Raise AssertionError if the training went on from elsewhere than `expected`; one killed early may not have said."""
    said = RESUMED.search(training.text())
    assert said is None or said[1] == expected, f"went on from {said[1]}, not from {expected}"


def clear(project: Project) -> None:
    """Remove what a training has written."""
    for name in ("models", "reports", "checkpoints"):
        shutil.rmtree(project.folder / name, ignore_errors=True)


def outcome(project: Project) -> dict[str, str]:
    """Return the hash of every file that the stage has written."""
    files = [path for name in ("models", "reports") for path in (project.folder / name).rglob("*") if path.is_file()]
    return {path.relative_to(project.folder).as_posix(): sha256_file(path) for path in files}


def line(kill: Kill) -> str:
    """Format a kill for the terminal."""
    return (
        f"{kill.moment:<15} {kill.where:<29} of {kill.victim:<7} all ended after {kill.seconds:>5.2f} s, "
        f"goes on from {kill.goes_on_from}"
    )


def report(results: list[Result], options: argparse.Namespace) -> None:
    """Write `kills.json` and print all kills and claims."""
    claims = []
    for one in results:
        share = float(not one.differing)
        claims.append(Claim(f"kills survived with the same weights and reports, {one.launch}, {one.optimizer}",
                            share, share, share, target=1.0, note=f"{len(one.kills)} kills"))  # fmt: skip
    kills = [kill for one in results for kill in one.kills]
    shares = sorted(kill.seconds / ENDS_WITHIN for kill in kills)
    claims.append(Claim(f"slowest end of all processes after a kill, over {ENDS_WITHIN:.0f} s",
                        shares[-1], shares[0], shares[-1], target=1.0, at_most=True))  # fmt: skip
    print()
    for kill in kills:
        print(f"{kill.launch:<10} {kill.optimizer:<15} {line(kill)}")
    details = {
        "kills": [asdict(kill) for kill in kills], "seed": options.seed, "settings": SETTINGS,
        "questions_a_step": QUESTIONS_A_STEP, "differing": {f"{r.launch}, {r.optimizer}": r.differing for r in results},
    }  # fmt: skip
    measure.write("kills", claims, details, {"questions and photographs": vqav2.origin(vqav2.SAMPLE)})


if __name__ == "__main__":
    main()
