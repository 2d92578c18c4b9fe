"""What does training keep on a busy machine, and does it say what would help? The small run beside other work.

`python -m benchmarks.threads` needs what the first two stages write (`make repro`), and a machine that does nothing else.
The train stage's own parts run under `accelerate launch` (`launch/cpu.yaml`) for some seconds: alone, with
`OMP_NUM_THREADS=1`, on one core, and beside busy processes. Rates are compared with those of the same number of threads on
the quiet machine, times the fair share of the cores: n threads beside b busy processes on c cores are due c / (n + b) of a
core each, at most one. About 6 minutes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import TrainerCallback

from benchmarks import measure
from benchmarks.measure import Claim
from vlm_vqa import cores
from vlm_vqa.data.feature_store import FeatureStore
from vlm_vqa.errors import UserError
from vlm_vqa.model.encoder import load_encoder
from vlm_vqa.model.vlm import initial_model
from vlm_vqa.params import load_params
from vlm_vqa.pipeline import entrypoint
from vlm_vqa.training import launch
from vlm_vqa.training.dataset import Collator
from vlm_vqa.training.prepare import FEATURES, RECORDS, prepare
from vlm_vqa.training.trainer import ProgressCallback, VqaTrainer, training_arguments

WARM_UP = 3
"""Steps that are not measured."""
BUSY = "machine is busy"


@dataclass(frozen=True)
class Case:
    """One way to start the training."""

    name: str
    busy: int = 0
    """Processes that compute beside it."""
    one_thread: bool = False
    """By `OMP_NUM_THREADS=1`; else the user says nothing."""
    one_core: bool = False
    """By `taskset -c 0`."""


CASES = (
    Case("quiet"),
    Case("quiet, OMP_NUM_THREADS=1", one_thread=True),
    Case("quiet, taskset -c 0", one_core=True),
    Case("beside 2", busy=2),
    Case("beside 2, OMP_NUM_THREADS=1", busy=2, one_thread=True),
    Case("beside 8", busy=8),
    Case("beside 8, OMP_NUM_THREADS=1", busy=8, one_thread=True),
)


@dataclass(frozen=True)
class Outcome:
    """What a training did within its seconds."""

    rate: float
    """Questions a second."""
    steps: int
    threads: int
    why: str
    said: str
    """That the machine is busy, or nothing."""


# --- in the training's process ---------------------------------------------------------------------------------------


class Stopwatch(TrainerCallback):
    """Ends training some seconds after its first steps, and remembers how many steps those were."""

    def __init__(self, seconds: float):
        self.seconds, self.begun, self.steps, self.elapsed = seconds, 0.0, 0, 0.0

    def on_step_end(self, args, state, control, **_):
        now = time.perf_counter()
        if state.global_step == WARM_UP:
            self.begun = now
        if self.begun:
            self.steps, self.elapsed = state.global_step - WARM_UP, now - self.begun
            # One step at least, however slow.
            control.should_training_stop = bool(self.steps) and self.elapsed >= self.seconds


def work(seconds: float, result: Path) -> None:
    """Train for some seconds; write steps, seconds and threads to `result`. What training says goes to stderr."""
    params = load_params()
    running = launch.start(params.train)
    encoder = load_encoder(params.vision, device="cpu")
    features = FeatureStore(FEATURES, {"encoder_hash": encoder.hash})
    data, layout, processor = prepare(params, encoder)
    model = initial_model(params.language, encoder.model.config, processor, params.seed)
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(params.train, params.seed, Path(folder), running)
        arguments.save_strategy = "no"
        arguments.num_train_epochs = 1000
        untracked = SimpleNamespace(set_tags=lambda tags: None, log_metrics=lambda metrics, step: None)
        callbacks = [ProgressCallback(untracked), watch := Stopwatch(seconds)]
        VqaTrainer(model, arguments, params.train, data, Collator(layout, features), callbacks, running).train()
    rate = watch.steps * params.train.batch_size * params.train.gradient_accumulation_steps / watch.elapsed
    found = {"rate": rate, "steps": watch.steps, "threads": running.threads.count, "why": running.threads.why}
    result.write_text(json.dumps(found))


# --- around it -------------------------------------------------------------------------------------------------------


@contextmanager
def busy(count: int) -> Generator[list[subprocess.Popen]]:
    """Keep `count` processes computing."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield others
    finally:
        for other in others:
            other.kill()
            other.wait()


def run(case: Case, seconds: float) -> Outcome:
    """Train as a user would start it.

    Raises:
        UserError: it failed; its output is shown.
    """
    here = Path(__file__).parents[1]
    silent = {name: value for name, value in os.environ.items() if name not in (cores.VARIABLE, cores.CARRIED)}
    environment = silent | {"PYTHONPATH": os.pathsep.join(map(str, (here / "src", here)))}
    if case.one_thread:
        environment[cores.VARIABLE] = "1"
    with tempfile.TemporaryDirectory() as scratch, busy(case.busy):
        result = Path(scratch) / "result.json"
        command = [
            *("taskset", "-c", "0") * case.one_core,
            "accelerate",
            "launch",
            "--quiet",
            "--config_file",
            "launch/cpu.yaml",
            "-m",
            "benchmarks.threads",
            "--worker",
            str(result),
            "--seconds",
            str(seconds),
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode != 0:
            raise UserError(f"{case.name}: failed:\n{done.stderr[-9000:]}")
        said = next((line for line in done.stderr.replace("\r", "\n").splitlines() if BUSY in line), "")
        return Outcome(said=said, **json.loads(result.read_text()))


def claims(outcomes: Mapping[str, Outcome], machine_cores: int) -> list[Claim]:
    """Return a ratio to the quiet run for each other case, and what is asked of training beside eight processes."""
    quiet = outcomes["quiet"].rate
    made = []
    for case in CASES[1:]:
        one = outcomes[case.name]
        ratio = one.rate / quiet
        note = f"threads {one.threads} ({one.why}){'; said so' * bool(one.said)}"
        made.append(Claim(f"{case.name}: questions/s over the quiet run's", ratio, ratio, ratio, note=note))
    warned = float(any(outcomes[case.name].said for case in CASES if not case.busy))
    made.append(Claim("quiet runs that say that the machine is busy", warned, warned, warned, 0.0, at_most=True))
    what = "beside 8: questions/s over those of a fair share of the cores"
    kept = _kept(outcomes, "beside 8", "quiet", machine_cores)
    advised = _kept(outcomes, "beside 8, OMP_NUM_THREADS=1", "quiet, OMP_NUM_THREADS=1", machine_cores)
    said = outcomes["beside 8"].said
    faster = outcomes["beside 8, OMP_NUM_THREADS=1"].rate > outcomes["beside 8"].rate
    # The advice must be true: it is held to the same bound.
    if kept < 0.5 and f"{cores.VARIABLE}=1" in said and faster:
        made.append(Claim(what, kept, kept, kept, note="it has said what would be faster"))
        what, kept = "beside 8, as it has advised (OMP_NUM_THREADS=1): the same", advised
    made.append(Claim(what, kept, kept, kept, 0.5))
    return made


def _kept(outcomes: Mapping[str, Outcome], name: str, quiet: str, machine_cores: int) -> float:
    """Return a case's rate over the quiet one of as many threads, as a share of what it is due beside eight processes."""
    due = min(1.0, machine_cores / (outcomes[name].threads + 8))
    return outcomes[name].rate / outcomes[quiet].rate / due


def main(arguments: Sequence[str] | None = None) -> None:
    """Train in every case and write `threads.json`; with `--worker` be the training of one of them."""
    parser = measure.parser("threads", __doc__, seconds=25)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = measure.parse(parser, arguments)
    if options.worker:
        entrypoint.run("threads", lambda: work(options.seconds, options.worker))
        return
    for folder in (RECORDS, FEATURES):
        if not folder.is_dir():
            raise UserError(
                f"{folder} is missing: run `make repro` first, or its stages fetch-vqav2 and extract-features."
            )
    outcomes: dict[str, Outcome] = {}
    for case in CASES:
        outcomes[case.name] = run(case, options.seconds)
        print(f"  {case.name}: {outcomes[case.name]}", flush=True)
    details: dict[str, Any] = {
        "seconds": options.seconds,
        "outcomes": {name: asdict(one) for name, one in outcomes.items()},
    }
    data = {"questions and pictures": load_params().data.source.value}
    measure.write("threads", claims(outcomes, measure.cores()), details, data)


if __name__ == "__main__":
    main()
