"""List the proofs, or run some of them, each in a process of its own.

    python -m proofs              what there is, and what each one says
    python -m proofs NAME ...     run these, with their own defaults; `python -m proofs.NAME --help` has the options

The exit code is 1 if a proof fails or misses its claim, 2 after a mistake of the user's, 130 after Ctrl-C.
"""

import argparse
import ast
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import begin, measure
from benchmarks.__main__ import conclude, read, report, run

KNOWN = (
    "strategies",
    "validation",
    "learning",
    "masks",
    "seeds",
    "rates",
    "real_shape",
    "data_scale",
    "kills",
    "flips",
    "consumers",
    "faults",
    "serving",
    "gpu",
    "queue",
    "start_memory",
    "team",
)


def main(arguments: Sequence[str] | None = None, results: Path = measure.RESULTS) -> int:
    """Return the exit code; `results` is where the proofs write."""
    parser = argparse.ArgumentParser(prog="python -m proofs", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(KNOWN)}; without one, the list")
    begin()
    names = parser.parse_args(arguments).names
    if unknown := [name for name in names if name not in KNOWN]:
        parser.error(f"no proof is called {', '.join(unknown)}; there are {', '.join(KNOWN)}.")
    if not names:
        print("\n".join(f"{name:<13} {first_line(name)}" for name in KNOWN))
        return 0
    measure.check_writable(results)
    failed = {name: reason for name in names if (reason := run(name, "proofs"))}
    contents = read(results, names, "proofs")
    print(report(contents))
    return conclude(contents, failed)


def first_line(name: str) -> str:
    """Return what a proof says of itself; nothing is imported for that."""
    text = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
