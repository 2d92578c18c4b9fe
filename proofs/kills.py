"""A killed `dvc repro`, whichever process at whatever moment, ends in the undisturbed run's dvc.lock when called again.

    python -m proofs.kills [--kills 200] [--launches cpu cpu-ddp cpu-fsdp2] [--seed 0] [--folder FOLDER]

The five stages run in a temporary copy of the project on the sample of VQAv2, real or drawn (see `benchmarks.vqav2`), once
undisturbed for each launch. A trial begins where none to four of the stages are done, and calls `make repro`'s command, or
`dvc repro` alone. The call gets a signal, SIGTERM, SIGINT or SIGKILL, to any process of its tree or to all, at

    any time      a random moment of what is left to do
    between       the next time after it that DVC has rewritten dvc.lock or its lock file, where a stage begins or ends
    writing       the next time after it that something has appeared in data, models, reports or checkpoints

and after one to six such calls the command is called once more and left alone. It must succeed; dvc.lock must be the
undisturbed run's to the byte, and every output what dvc.lock says; no process may have lived for more than 10 s after its
parent; no traceback may have been printed, by killed calls neither, but one of fsspec's that Ctrl-C leaves in DVC's own
process, which is counted apart. Where DVC refuses its own torn lock file, which no stage
of ours can mend, the bare `dvc repro` is followed by `make repro`'s command; the counts say how often.

Shared with the undisturbed run: the packages, the sample, and outputs and DVC's cache of the stages that are done when a
trial begins. Nothing else: the run cache holds no stage that is to run, and what killed calls have left in it is removed in
every second trial. The shell is the person who calls: it is killed with all others only.

With --folder all is kept: what was run counts, and the next call goes on. Two may run side by side, each with a seed and a
folder of its own; --also FOLDER counts another's trials in. About 60 s a kill on a core.
"""

import argparse
import json
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import measure, vqav2
from benchmarks.measure import Claim
from proofs import tree
from proofs.project import workplace
from proofs.states import BARE, LAUNCHES, MAKE, SETTINGS, STAGES, Changes, States
from vlm_vqa.errors import UserError
from vlm_vqa.pipeline.repair import recorded, verify

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
MOMENTS = {"any time": 6, "between": 3, "writing": 2}
WATCHED = {
    "between": ("dvc.lock", ".dvc/tmp/rwlock"),
    "writing": (
        "data",
        "data/records/.part",
        "data/records",
        "data/features",
        "data/features.parts",
        "models",
        "models/trained",
        "models/export",
        "reports",
        "checkpoints",
        "mlflow.db",
    ),
}
PATIENCE = 600.0
TRACEBACK = re.compile(r"Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)*.*")
FSSPEC = "/fsspec/callbacks.py", "AttributeError: 'function' object has no attribute 'close'"
"""Where a finalizer of its progress bars meets Ctrl-C, and what it makes of an executor that DVC was interrupted in."""


@dataclass
class Trial:
    """Some killed calls, the call that was left alone, and what was wrong."""

    seed: int
    number: int
    launch: str
    state: int
    """How many stages were done."""
    command: str
    """The last call."""
    keeps_run_cache: bool
    kills: list[dict[str, Any]] = field(default_factory=list)
    refused: str = ""
    """What DVC said where it refused `dvc repro` before any stage, so that `make repro`'s command had to follow."""
    problems: list[str] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> None:
    """Kill as often as asked, or what is left of it, and write `kills.json`."""
    parser = measure.parser("kills", __doc__, "proofs", kills=200)
    parser.add_argument("--launches", nargs="+", choices=LAUNCHES, default=list(LAUNCHES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep all here and go on where it stopped")
    parser.add_argument("--also", type=Path, nargs="+", default=[], help="folders of other seeds, counted in")
    options = measure.parse(parser, arguments)
    with workplace(options.folder) as folder:
        log = folder / "kills.jsonl"
        others = [trial for other in options.also for trial in read(other / "kills.jsonl", options.launches)]
        trials = read(log, options.launches, options.seed)
        while (done := sum(len(one.kills) for one in [*trials, *others])) < options.kills:
            number = len(trials)
            states = States(folder, options.launches[number % len(options.launches)])
            trials.append(run(states, number, options.seed))
            with log.open("a", encoding="utf-8") as file:
                print(json.dumps({"launches": options.launches, **asdict(trials[-1])}), file=file)
            print(line(trials[-1], done, options.kills), flush=True)
    report([*trials, *others], options)


def read(log: Path, launches: list[str], seed: int | None = None) -> list[Trial]:
    """Return the trials that are done.

    Raises:
        UserError: they are of another seed or other launches.
    """
    trials = []
    for text in log.read_text(encoding="utf-8").splitlines() if log.exists() else []:
        entry = json.loads(text)
        if entry.pop("launches") != launches or seed not in (None, entry["seed"]):
            raise UserError(f"{log}: begun with another --seed or other --launches. Name these, or another --folder.")
        trials.append(Trial(**entry))
    return trials


def run(states: States, number: int, seed: int) -> Trial:
    """Begin at a state, kill, repeat, compare."""
    rng = random.Random(f"{seed} {number}")
    trial = Trial(seed, number, states.launch, rng.randrange(len(STAGES)), rng.choice((BARE, MAKE)), number % 2 == 0)
    states.restore(trial.state)
    for _ in range(rng.randint(1, 6)):
        with states.call(rng.choice((trial.command, MAKE))) as call:
            if (kill := strike(states, call, rng)) is not None:
                trial.kills.append(kill)
                trial.problems += after(states, call, kill)
            if call.end(PATIENCE) or call.shell.returncode == 0:
                break
    if not trial.keeps_run_cache:
        shutil.rmtree(states.place / ".dvc/cache/runs", ignore_errors=True)
    repeat(states, trial)
    return trial


def strike(states: States, call: tree.Call, rng: random.Random) -> dict[str, Any] | None:
    """Wait for a drawn moment and send a drawn signal; None if the call has ended before."""
    moment = rng.choices(list(MOMENTS), list(MOMENTS.values()))[0]
    left = states.left()
    share, count, delay, number = rng.random(), rng.randint(1, 3), rng.uniform(0, 0.1), rng.choice(SIGNALS)
    call.wait(lambda: False, share * left)
    if moment != "any time":
        # The next change, or one of those that follow it at once.
        changes = Changes([states.place / path for path in WATCHED[moment]])
        call.wait(lambda: changes.seen() >= count, PATIENCE)
        call.wait(lambda: False, delay)
    if call.shell.poll() is not None:
        return None
    everyone, living = rng.random() < 0.2, sorted(call.victims(), key=lambda one: one.pid)
    victim = None if everyone or not living else rng.choice(living)
    running = re.findall(r"Running stage '([\w-]+)'", call.text())
    kill = {
        "moment": moment,
        "signal": number.name,
        "victim": "all" if victim is None else tree.name(victim),
        "seconds": round(call.seconds(), 2),
        "stage": running[-1] if running else "none",
    }
    call.signal(number, victim)
    return kill


def after(states: States, call: tree.Call, kill: dict[str, Any]) -> list[str]:
    """Wait for the end of a call that was hit; return what is wrong with it."""
    begun = time.monotonic()
    wrong = call.end(PATIENCE)
    kill |= {
        "ended": call.shell.poll(),
        "outlived": round(call.outlived, 1),
        "seconds_to_end": round(time.monotonic() - begun, 1),
    }
    where = f"{kill['signal']} to {kill['victim']} ({kill['moment']}, stage {kill['stage']})"
    found = tracebacks(call)
    kill["fsspec"] = sum(map(fsspecs, found))
    problems = [wrong] if wrong else []
    problems += [f"a traceback: {last(text)}" for text in found if not fsspecs(text)]
    return [f"{where}: {text} ({keep(states, call)})" for text in problems]


def repeat(states: States, trial: Trial) -> None:
    """Call the command once more, leave it alone, and compare."""
    for command in dict.fromkeys((trial.command, MAKE)):
        with states.call(command) as call:
            wrong, text = call.end(PATIENCE), call.text()
            code = call.shell.poll()
        if code and command == BARE and "Running stage" not in text and "didn't change, skipping" not in text:
            trial.refused = text.strip()[-300:]
            continue
        if wrong or code:
            trial.problems.append(f"{command} again ended with {code}: {wrong or text.strip()[-600:]}")
        trial.problems += [
            f"{command} again: a traceback: {last(text)} ({keep(states, call)})" for text in tracebacks(call)
        ]
        break
    lock = states.place / "dvc.lock"
    if not lock.exists() or lock.read_bytes() != states.expected:
        trial.problems.append("dvc.lock differs from the undisturbed run's")
    else:
        with recorded(states.place, []) as outs:
            trial.problems += [f"output: {fault}" for fault in verify(outs)]


def tracebacks(call: tree.Call) -> list[str]:
    """Return the tracebacks that were printed."""
    return TRACEBACK.findall(call.text())


def last(traceback: str) -> str:
    return traceback.splitlines()[-1][:150]


def fsspecs(traceback: str) -> bool:
    """Whether it is DVC's process that printed it, out of fsspec."""
    return any(text in traceback for text in FSSPEC)


def keep(states: States, call: tree.Call) -> str:
    """Keep what a terminal shows and return the file's name."""
    kept = states.folder / f"terminal-{time.time():.0f}.txt"
    kept.write_text(call.text(), encoding="utf-8")
    return kept.name


def line(trial: Trial, before: int, asked: int) -> str:
    """Format a trial for the terminal."""
    kills = "; ".join(
        f"{one['signal']} to {one['victim']}, {one['moment']}, stage {one['stage']}" for one in trial.kills
    )
    verdict = "FAILED: " + "; ".join(trial.problems) if trial.problems else "the same dvc.lock"
    return f"{before + len(trial.kills)}/{asked}  trial {trial.number}, {trial.launch}: {kills or 'no kill'}: {verdict}"


def report(trials: Sequence[Trial], options: argparse.Namespace) -> None:
    """Write `kills.json` and print the claims and what failed."""
    kills = [kill for trial in trials for kill in trial.kills]
    claims = []
    for launch in options.launches:
        mine = [trial for trial in trials if trial.launch == launch and trial.kills]
        share = sum(not trial.problems for trial in mine) / max(len(mine), 1)
        count = sum(len(trial.kills) for trial in mine)
        claims.append(
            Claim(
                f"killed runs that end as the undisturbed one, {launch}",
                share,
                share,
                share,
                target=1.0,
                note=f"{count} kills",
            )
        )
    slowest = max((kill["outlived"] for kill in kills), default=0.0) / tree.OUTLIVES_BY
    claims.append(
        Claim(f"longest life after a parent's, over {tree.OUTLIVES_BY:.0f} s", slowest, 0.0, slowest, 1.0, True)
    )
    done = Claim("kills run over kills asked for", len(kills) / options.kills, 0.0, 1.0, 1.0)
    bare = [trial for trial in trials if trial.command == BARE and trial.kills]
    print(f"\n{len(kills)} of {options.kills} kills run in {len(trials)} trials; by signal, moment, stage")
    for key in ("signal", "moment", "stage"):
        print("  " + ", ".join(f"{name} {count}" for name, count in Counter(kill[key] for kill in kills).most_common()))
    print(f"  fsspec's traceback in DVC after {sum(bool(kill.get('fsspec')) for kill in kills)} kills")
    print(f"  dvc repro alone sufficed in {sum(not t.refused for t in bare)} of {len(bare)} trials that end with it")
    for trial in trials:
        if trial.problems:
            print(f"FAILED: trial {trial.number} (seed {trial.seed}, {trial.launch}): {trial.problems}")
    details = {
        "kills": kills,
        "trials": [asdict(trial) for trial in trials],
        "settings": SETTINGS,
    }
    measure.write("kills", [*claims, done], details, {"questions and photographs": vqav2.origin(vqav2.SAMPLE)})


if __name__ == "__main__":
    main()
