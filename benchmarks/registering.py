"""What a run takes longer because its export becomes a version of a registered model in MLflow, with its data and scores.

    python -m benchmarks.registering [--rounds 3]

After `make repro`: `vlm-vqa track`'s work on the outputs that are there, in a process and a store of its own each time, with
the registry and without. Both record the run, its parameters, curves, reports and scores, and import what the export stage
has imported already, which registers.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import measure
from benchmarks.measure import Claim

ROOT = Path(__file__).parents[1]
MOST_SECONDS = 5.0
WITHOUT = "registry.register, registry.subject = lambda *_: False, lambda *_: {}"
PROGRAM = """
import vlm_vqa.inference.predictor
from vlm_vqa.tracking import registry
from vlm_vqa.tracking.recreate import recreate_run
{}
assert recreate_run(".")[1], "nothing was recorded"
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both and write `registering.json`."""
    options = measure.parse(measure.parser("registering", __doc__, rounds=3), arguments)
    ways = {"with": lambda: record(""), "without": lambda: record(WITHOUT)}
    seconds = measure.alternate(ways, options.rounds, warm_up=1)
    longer = [one - other for one, other in zip(seconds["with"].seconds, seconds["without"].seconds, strict=True)]
    found = statistics.median(longer)
    what = "seconds that a run takes longer because its export is registered"
    claim = Claim(what, found, min(longer), max(longer), MOST_SECONDS, True)
    details = {name: timing.seconds for name, timing in seconds.items()}
    measure.write("registering", [claim], details, {"questions and pictures": "easy-vqa"})


def record(change: str) -> None:
    """Record the outputs in a new store, by a new process."""
    with tempfile.TemporaryDirectory() as folder:
        place = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
        subprocess.run(
            [sys.executable, "-c", PROGRAM.format(change)], cwd=ROOT, env={**os.environ, **place}, check=True
        )


if __name__ == "__main__":
    main()
