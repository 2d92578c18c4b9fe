"""Whatever a person's files or a mirror hold, a command ends with a result or with one sentence, and loses nothing.

    python -m proofs.faults [--params 300] [--data 300] [--mirror 50] [--exports 40] [--starts 0] [--seed 0]

Each case is drawn from the seed and runs in a process of its own, for 20 s at most:

    params    the small preset with up to three keys changed, through `vlm-vqa check`
    data      a small data set, one or two files damaged: fetched; in the official layout, pictures in a folder or a zip, or
              tables of all kinds
    mirror    a server of the six archives that drops, stalls, lies and refuses, a few times or for ever: fetched
    exports   an exported model, one file damaged: through `vlm-vqa ask`
    starts    parameter files that `check` takes, with which the train stage starts on the tiny project (10 minutes for 40)

"taken" is a result, "refused" a UserError, exit code 2. Faults are "raised" (another exception), "hung" and "died"; "lost",
where what earlier runs have written is not as it was after a refusal, or anything half-written is left; "unclear", a
refusal in a program's words; and "silent", a mirror's bytes that make other records
than the right ones. Answers of a damaged export are the business of `proofs.flips`. A start that still trains after 60 s is
taken.

With --folder the tiny project is kept. About 4 minutes without the starts.
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch

from benchmarks import measure, vqav2
from benchmarks.measure import Claim
from proofs import child, fault_cases
from proofs.fault_cases import Outcome
from proofs.project import ROOT, workplace
from vlm_vqa.errors import UserError

COUNTS = {"params": 300, "data": 300, "mirror": 50, "exports": 40, "starts": 0}
GOOD, BAD = ("taken", "refused"), (*child.BAD, "lost", "silent", "unclear")


@dataclass(frozen=True)
class Case:
    """A drawn case and what came of it."""

    kind: str
    number: int
    what: str
    verdict: str
    said: str


def cases(kind: str, count: int, seed: int, run: Callable[[Path, Random], Outcome]) -> list[Case]:
    """Run `count` cases of a kind, each in a folder of its own that has the launches."""
    found = []
    for number in range(count):
        with tempfile.TemporaryDirectory(prefix="faults-") as place:
            (Path(place) / "launch").symlink_to(ROOT / "launch")
            what, verdict, said = run(Path(place).resolve(), Random(f"{seed} {kind} {number}"))
        found.append(Case(kind, number, what[:300], "taken" if verdict == "done" else verdict, said[:300]))
        if found[-1].verdict in BAD:
            print(f"{found[-1].verdict}: {kind} {number}: {what[:200]}: {said[:300]}", flush=True)
    print(f"{kind}: {count} drawn", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all cases and write `faults.json`."""
    parser = measure.parser("faults", __doc__, "proofs")
    for kind, count in COUNTS.items():
        parser.add_argument(f"--{kind}", type=int, default=count, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep the tiny project of the starts here")
    options = measure.parse(parser, arguments)
    torch.set_num_threads(1)
    seed = options.seed
    found = cases("params", options.params, seed, fault_cases.check) if options.params else []
    found += cases("data", options.data, seed, fault_cases.damaged_data) if options.data else []
    found += cases("mirror", options.mirror, seed, fault_cases.faulty_mirror) if options.mirror else []
    if options.exports:
        with tempfile.TemporaryDirectory(prefix="faults-") as place:
            whole = Path(place)
            if (made := child.in_child(lambda: fault_cases.make_export(whole)))[0] != "done":
                raise UserError(f"no export could be made: {made[1]}")
            found += cases("exports", options.exports, seed, lambda at, rng: fault_cases.damaged_export(at, rng, whole))
    if options.starts:
        with workplace(options.folder) as folder:
            project = fault_cases.tiny_project(folder)
            found += cases("starts", options.starts, seed, lambda at, rng: fault_cases.started(at, rng, project))
    report(found, options)


def report(found: Sequence[Case], options: argparse.Namespace) -> None:
    """Write `faults.json` and print the table."""
    print(f"\n{'kind':<10} {'drawn':>6} " + " ".join(f"{verdict:>8}" for verdict in (*GOOD, *BAD)))
    claims = []
    for kind in dict.fromkeys(one.kind for one in found):
        counts = Counter(one.verdict for one in found if one.kind == kind)
        print(f"{kind:<10} {counts.total():>6} " + " ".join(f"{counts[verdict]:>8}" for verdict in (*GOOD, *BAD)))
        share = sum(counts[verdict] for verdict in GOOD) / counts.total()
        note = f"{counts.total()} drawn, {counts['refused']} refused"
        claims.append(Claim(f"faults that end in a result or a sentence, {kind}", share, share, share, 1.0, note=note))
    details = {
        "cases": [asdict(one) for one in found],
        "seed": options.seed,
        "asked": {k: getattr(options, k) for k in COUNTS},
    }
    measure.write("faults", claims, details, {"questions and pictures": vqav2.DRAWN})


if __name__ == "__main__":
    main()
