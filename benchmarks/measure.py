"""How the benchmarks measure: pairs side by side in one process, alternating, medians with spread, on a named machine.

Absolute times say little on a shared machine, ratios of neighbouring runs say a lot: every claim is a ratio.
"""

import argparse
import gc
import os
import platform
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks import begin
from vlm_vqa.cores import usable_cores
from vlm_vqa.errors import UserError
from vlm_vqa.hashing import write_json

COMMITTED = Path(__file__).parent / "results"
"""What README and documents are held to, measured on the machine that each file names."""
RESULTS = Path(os.environ.get("VLM_VQA_RESULTS") or Path(__file__).parent / "results.here")
"""What is measured on this machine: the documents speak of another one. VLM_VQA_RESULTS=benchmarks/results renews them."""
VERSIONS = ("torch", "transformers", "accelerate", "bitsandbytes", "crfm-helm")


@dataclass(frozen=True)
class Timing:
    """Seconds of each measured round, in order."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Claim:
    """One line of the table: a ratio with its spread over the rounds, and what is asked of it."""

    what: str
    ratio: float
    low: float
    high: float
    target: float | None = None
    at_most: bool = False
    """The target is an upper bound; else a lower one."""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.target is None:
            return None
        return self.ratio <= self.target if self.at_most else self.ratio >= self.target


def alternate(candidates: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, Timing]:
    """Time every candidate once a round, in turn, so that a slow minute of the machine falls on all of them.

    Args:
        candidates: what to call, by name.
        rounds: measured rounds; `warm_up` more go before them and are not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(warm_up + rounds):
        for name, run in candidates.items():
            gc.collect()
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            elapsed = time.perf_counter() - start
            if number >= warm_up:
                seconds[name].append(elapsed)
                print(f"  round {number - warm_up + 1}/{rounds}  {name}: {elapsed:.3g} s", flush=True)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def claim(what: str, slow: Timing, fast: Timing, **options: Any) -> Claim:
    """Return how many times faster `fast` is: the median, least and greatest ratio of neighbouring rounds."""
    ratios = [one / other for one, other in zip(slow.seconds, fast.seconds, strict=True)]
    return Claim(what, statistics.median(ratios), min(ratios), max(ratios), **options)


def synchronize() -> None:
    """Wait for the GPU where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def cores() -> int:
    """Return how many cores this process may use."""
    return usable_cores().count


def device() -> torch.device:
    """Where the benchmarks run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def matmul_rate(m: int, k: int, n: int, dtype: torch.dtype, seconds: float = 2.0) -> float:
    """Return FLOP/s of [m, k] @ [k, n], as a linear layer computes it."""
    a, b = (torch.randn(*shape, device=device()).to(dtype) for shape in ((m, k), (n, k)))
    run = lambda: torch.nn.functional.linear(a, b)  # noqa: E731
    run()
    synchronize()
    # Enough at once that a GPU does not wait for the host.
    start, products, at_once = time.perf_counter(), 0, 1 if device().type == "cpu" else 20
    while time.perf_counter() - start < seconds:
        for _ in range(at_once):
            run()
        synchronize()
        products += at_once
    return products * 2 * m * k * n / (time.perf_counter() - start)


def machine() -> dict[str, Any]:
    """Name the machine and the versions that were measured."""
    name = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        name = next(
            (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line), name
        )
    return {
        "cpu": name,
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{package: installed(package) for package in VERSIONS},
    }


def installed(package: str) -> str | None:
    """Return the version of an installed package, None where there is none: not every program needs each."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def parser(name: str, doc: str, package: str = "benchmarks", **counts: int) -> argparse.ArgumentParser:
    """Return the parser of `python -m PACKAGE.NAME`; each count becomes an option, a whole number from 1."""
    made = argparse.ArgumentParser(prog=f"python -m {package}.{name}", description=doc.splitlines()[0])
    for option, default in counts.items():
        made.add_argument(f"--{option.replace('_', '-')}", type=positive, default=default, metavar="N")
    return made


def positive(text: str) -> int:
    """Read a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def parse(made: argparse.ArgumentParser, arguments: Sequence[str] | None, results: Path | None = None) -> Any:
    """Return the options, or raise UserError if results could not be written: measuring may take an hour."""
    begin()
    options = made.parse_args(arguments)
    check_writable(results or RESULTS)
    return options


def check_writable(results: Path) -> None:
    """Raise UserError unless files can be written into a folder, which is made if it is not there."""
    try:
        results.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=results):
            pass
    except OSError as error:
        raise UserError(f"{results}: results cannot be written there ({error.strerror}). Make it writable.") from error


def ended(code: int) -> str:
    """Say how a process ended, by its exit code."""
    if code >= 0:
        return f"ended with {code}"
    killed = " (mostly for want of memory)" if code == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{killed}"


def named(data: Mapping[str, str] | None) -> str:
    """Say what was measured with, such as "questions: real VQAv2"."""
    return ", ".join(f"{what}: {of}" for what, of in (data or {"data": "not said"}).items())


def write(
    name: str,
    claims: list[Claim],
    details: Mapping[str, Any],
    data: Mapping[str, str],
    folder: Path | None = None,
    quiet: bool = False,
) -> None:
    """Write `NAME.json` into a folder, by default `RESULTS`, and print the claims unless `quiet`.

    Args:
        data: what was measured with and where it is from, such as questions and `vqav2.REAL` or `vqav2.DRAWN`.
    """
    folder = folder or RESULTS
    content = {
        "machine": machine(),
        "data": dict(data),
        "claims": [asdict(one) | {"met": one.met} for one in claims],
        "details": dict(details),
    }
    write_json(folder / f"{name}.json", content)
    if not quiet:
        print(f"{named(data)}\n{table(claims)}", flush=True)


def table(claims: list[Claim]) -> str:
    """Format claims for a terminal."""
    lines = []
    for one in claims:
        bound = "" if one.target is None else f"{'at most' if one.at_most else 'at least'} {one.target:g}"
        verdict = {None: "", True: "met", False: "MISSED"}[one.met]
        spread = f"({one.low:.3g} .. {one.high:.3g})"
        lines.append(f"{one.what:<78} {one.ratio:>8.3g}  {spread:<20} {bound:<14} {verdict} {one.note}".rstrip())
    return "\n".join(lines)
