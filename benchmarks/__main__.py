"""Run benchmarks, each in a process of its own, and show everything that they have claimed so far.

    python -m benchmarks              speed and memory
    python -m benchmarks NAME ...     only these
    python -m benchmarks --draw       only the table and the picture of the results that are there

The exit code is 1 if a target is missed or a benchmark fails.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import measure, picture
from benchmarks.measure import Claim

DEFAULT = ("training_step", "memory", "generation", "scorer", "extraction")
"""Speed and memory; the others are about what comes out."""
KNOWN = (*DEFAULT, "features", "data_scale", "real_shape", "learning", "strategies", "kills", "threads")
ROOT = Path(__file__).parents[1]


def main(arguments: Sequence[str] | None = None, results: Path = measure.RESULTS) -> int:
    """Return the exit code; `results` is where the benchmarks write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"{', '.join(KNOWN)}; by default the first {len(DEFAULT)}"
    )
    parser.add_argument(
        "--draw", action="store_true", help="run nothing: table and picture of the results that are there"
    )
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in KNOWN]
    if unknown:
        parser.error(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(KNOWN)}.")
    if options.draw and options.names:
        parser.error("--draw runs nothing and draws all results; leave the names out.")
    failed = [] if options.draw else [name for name in options.names or DEFAULT if not run(name)]
    contents = read(results)
    if not contents:
        print(f"no results in {results}; run python -m benchmarks first.", file=sys.stderr)
        return 1
    print(report(contents))
    picture.draw({name: content for name, content in contents.items() if name in DEFAULT}, results / "speed.png")
    print(f"\n{results / 'speed.png'}")
    missed = [one.what for content in contents.values() for one in claims(content) if one.met is False]
    for what in missed:
        print(f"MISSED: {what}", file=sys.stderr)
    for name in failed:
        print(f"FAILED: {name}; its results above are of an earlier run, if any.", file=sys.stderr)
    return int(bool(missed or failed))


def run(name: str) -> bool:
    """Run one benchmark; its output goes to the terminal. Return whether it ended well."""
    print(f"== {name}", flush=True)
    return subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], cwd=ROOT).returncode == 0


def read(results: Path) -> dict[str, dict[str, Any]]:
    """Return what `measure.write` wrote, by benchmark, in the order of `KNOWN`."""
    paths = {name: results / f"{name}.json" for name in KNOWN}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.is_file()}


def claims(content: Mapping[str, Any]) -> list[Claim]:
    """Return a benchmark's claims; whether they are met is judged anew."""
    return [Claim(**{key: value for key, value in one.items() if key != "met"}) for one in content["claims"]]


def report(contents: Mapping[str, Mapping[str, Any]]) -> str:
    """Return one table of all claims, under the machine and the versions that they were measured with."""
    machine, parts = None, []
    for name, content in contents.items():
        if content["machine"] != machine:
            machine = content["machine"]
            parts.append("\nmeasured on: " + ", ".join(f"{key} {value}" for key, value in machine.items()))
        parts.append(f"\n{name}\n{measure.table(claims(content))}")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
