"""Whether every path works on one GPU, and how fast: in at most nine minutes.

    python -m proofs.gpu [--minutes 9] [--only NAME ...] [--tiny]

Its checks (`proofs.gpu_checks`) run one after another in a process of their own, which is started again after one that
failed and ended where one takes too long; those for which no time is left are named. The results are written after every
check; of checks that are not asked for the file keeps what this card has done before. The models have random weights:
nothing is downloaded.

With --tiny all of it runs on a CPU as well, with the smallest models, to see that it runs; what comes out is written to
gpu_tiny.json and says nothing about speed.
"""

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import measure
from benchmarks.measure import Claim
from vlm_vqa.errors import UserError

ROOT = Path(__file__).parents[1]
TINY = "--tiny"
MARK = "gpu_checks "
"""Begins a line that is for us."""
NOT_RUN, TIME = "not run", "time"
START_SECONDS = 120
"""In which a process is to have imported everything."""
ALL_GPUS = "VLM_VQA_ALL_GPUS"
"""A variable with what `CUDA_VISIBLE_DEVICES` is for the check of all GPUs; the others see one."""
PROGRAM = (sys.executable, "-m", "proofs.gpu_checks")
OPTIONAL = ("bitsandbytes", "deepspeed", "datasets", "torchvision")
"""Packages of the whole environment that the checks do without, some of what they check not."""


class Check(NamedTuple):
    """What a check says, and the seconds that it is given on a GPU; it is ended after twice as many."""

    seconds: int
    what: str


CHECKS = {
    "rates": Check(10, "matrix products"),
    "rounding": Check(10, "stochastic rounding"),
    "eight_bit": Check(15, "8-bit AdamW"),
    "autocast": Check(15, "bfloat16 autocast against float32"),
    "step": Check(150, "a training step, shared rows against the stock recipe"),
    "resume": Check(40, "the launch; a training killed and resumed"),
    "launches": Check(70, "FSDP2, DDP and DeepSpeed on all GPUs"),
    "preset": Check(120, "training with the preset for one GPU"),
    "sharing": Check(25, "generation with shared prefixes"),
    "answers": Check(40, "answers a second"),
    "features": Check(40, "features stored against live"),
    "attention": Check(35, "flex attention against a float64 reference"),
    "flex_step": Check(75, "a training step with flex attention"),
}
"""In the order in which they run: what is quick first, then what matters most."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the checks and write `gpu.json`; exit code 1 if one fails or misses its target."""
    parser = measure.parser("gpu", __doc__, "proofs", minutes=9)
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), metavar="NAME")
    parser.add_argument(TINY, action="store_true", help="the smallest models, on any machine")
    options = measure.parse(parser, arguments)
    if not options.tiny and not torch.cuda.is_available():
        raise UserError(f"torch sees no GPU here. Run it where there is one, or try it out with {TINY}.")
    name = "gpu_tiny" if options.tiny else "gpu"
    found: dict[str, dict[str, Any]] = {}
    ends = time.time() + 60 * options.minutes
    for result in run(options.only, ends, options.tiny):
        found[result.pop("end")] = result
        print(f"{result['status']}  ({result['seconds']} s)", flush=True)
        write(name, found, options.only)
    claims = write(name, found, options.only)
    print(measure.table(claims))
    if any(one.met is False for one in claims):
        sys.exit(1)


def run(names: Sequence[str], ends: float, tiny: bool) -> Iterator[dict[str, Any]]:
    """Yield what comes of each check: `end`, its name, `status`, `seconds`, `claims` and `details`."""
    waiting = list(names)
    while waiting:
        worker = Worker(waiting, ends, tiny)
        try:
            for result in worker.results():
                waiting.remove(result["end"])
                yield result
        finally:
            worker.end()
        if worker.broken and waiting:
            # It could not even begin; another one could not, either.
            for name in waiting:
                yield outcome(name, f"failed: its process {worker.broken}", 0)
            return


def outcome(name: str, status: str, seconds: float) -> dict[str, Any]:
    """Return the result of a check that could not tell its own."""
    return {"end": name, "status": status, "seconds": round(seconds, 1), "claims": [], "details": {}}


class Worker:
    """A process that runs checks, seen from outside."""

    def __init__(self, names: Sequence[str], ends: float, tiny: bool):
        command = [*PROGRAM, *names, "--until", str(ends), *([TINY] if tiny else [])]
        # A group of its own: what a check has started ends with it.
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.ends, self.tiny, self.broken = ends, tiny, ""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def results(self) -> Iterator[dict[str, Any]]:
        """Yield the results of its checks, the last one's also if the process died in it or it took too long."""
        name, begun, limit = "", time.time(), START_SECONDS * (5 if self.tiny else 1)
        while True:
            try:
                line = self.lines.get(timeout=max(1.0, begun + limit - time.time()))
            except queue.Empty:
                self.end()
                line, said = None, f"no end after {time.time() - begun:.0f} s"
            else:
                said = "" if line else measure.ended(self.process.wait())
            if line is None:
                if name:
                    yield outcome(name, f"failed: {said}", time.time() - begun)
                elif said != measure.ended(0):
                    self.broken = said
                return
            if not line.startswith(MARK):
                print(line, end="", flush=True)
                continue
            told = json.loads(line.removeprefix(MARK))
            if "end" in told:
                name, begun, limit = "", time.time(), START_SECONDS
                yield told
            else:
                name, begun = told["begin"], time.time()
                print(f"{name}: {CHECKS[name].what} ...", flush=True)
                limit = 600 if self.tiny else min(2 * CHECKS[name].seconds, max(10.0, self.ends - begun))

    def end(self) -> None:
        """End it and all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def environment() -> dict[str, str]:
    """Return the environment of a process that runs checks: one GPU, and this project's packages."""
    paths = os.pathsep.join(filter(None, [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH")]))
    # Memory that is given back in pieces of any size: both recipes' steps run in one process.
    found = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "CUDA_VISIBLE_DEVICES": "0"}
    every = ",".join(map(str, range(torch.cuda.device_count())))
    found[ALL_GPUS] = os.environ.get("CUDA_VISIBLE_DEVICES", every)
    return {**found, "TOKENIZERS_PARALLELISM": "false", **os.environ, "PYTHONPATH": paths}


def write(name: str, found: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> list[Claim]:
    """Write what there is so far, and return its claims; a check that did not run now is as it was on this very card."""
    file, this = measure.RESULTS / f"{name}.json", {"machine": measure.machine(), "card": card()}
    checks: dict[str, dict[str, Any]] = {key: NO_RESULT | {"status": f"{NOT_RUN}: not yet"} for key in names} | earlier(
        file, this
    )
    for key, one in found.items():
        if not one["status"].startswith(NOT_RUN) or checks[key]["status"].startswith(NOT_RUN):
            checks[key] = {**NO_RESULT, **one, "date": time.strftime("%Y-%m-%d")}
    tried = {key: one["status"] for key, one in checks.items() if not one["status"].startswith(NOT_RUN)}
    bad = [key for key, status in tried.items() if status != "passed"]
    share = 1 - len(bad) / max(1, len(tried))
    claims = [Claim("GPU: checks that ran to their end, of those begun", share, share, share, 1.0, note=", ".join(bad))]
    for key in (key for key in CHECKS if key in checks):
        claims += [Claim(**{part: of for part, of in one.items() if part != "met"}) for one in checks[key]["claims"]]
    missing = [package for package in OPTIONAL if find_spec(package) is None]
    details = {"card": this["card"], "missing_packages": missing, "checks": checks}
    measure.write(name, claims, details, {"questions and pictures": "drawn", "weights": "random"}, quiet=True)
    return claims


NO_RESULT: dict[str, Any] = {"status": "", "seconds": 0, "claims": [], "details": {}, "date": None}


def earlier(file: Path, this: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what a file of results has of checks, if they ran on this card, this machine and these versions."""
    if not file.is_file():
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    same = {"machine": content["machine"], "card": content["details"]["card"]} == this
    return content["details"].get("checks", {}) if same else {}


def card() -> dict[str, Any]:
    """Name the GPU, its memory, its driver and CUDA; nothing where there is none."""
    if not torch.cuda.is_available():
        return {}
    found = torch.cuda.get_device_properties(0)
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    said = subprocess.run(ask, capture_output=True, text=True, check=False).stdout if shutil.which(ask[0]) else ""
    return {
        "name": found.name,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "capability": f"{found.major}.{found.minor}",
        "driver": said.strip() or None,
        "cuda": torch.version.cuda,
    }


def page(content: Mapping[str, Any]) -> str:
    """Return results as docs/gpu.md shows them: the card, a table of what was measured, and what did not pass."""
    made, machine = content["details"], content["machine"]
    of = f"{made['card']['name']}, {made['card']['memory_gib']} GiB, driver {made['card']['driver']}"
    lines = [f"Measured on one {of}; torch {machine['torch']}, transformers {machine['transformers']}:", ""]
    lines += ["| what | measured | lowest .. highest | target | |", "|---|---|---|---|---|"]
    for one in content["claims"]:
        target = "" if one["target"] is None else f"{'at most' if one['at_most'] else 'at least'} {one['target']:.3g}"
        verdict = {True: "met", False: "**missed**", None: ""}[one["met"]]
        spread = f"{one['low']:.3g} .. {one['high']:.3g}"
        lines.append(f"| {one['what'].removeprefix('GPU: ')} | {one['ratio']:.3g} | {spread} | {target} | {verdict} |")
    others = [f"`{name}`: {one['status']}" for name, one in made["checks"].items() if one["status"] != "passed"]
    return "\n".join([*lines, "", "; ".join(others) or "Every check ran to its end."])


if __name__ == "__main__":
    main()
