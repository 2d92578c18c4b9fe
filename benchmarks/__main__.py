"""Run benchmarks, each in a process of its own, and show everything that they have claimed so far.

    python -m benchmarks              speed and memory
    python -m benchmarks NAME ...     only these
    python -m benchmarks --draw       only the table and the picture of the results that are there

A benchmark that fails does not keep the others from running; at the end stands which failed, and why. The exit code is 1 if
a target is missed or a benchmark fails, 2 after a mistake of the user's, 130 after Ctrl-C.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks import begin, measure, picture
from benchmarks.measure import Claim, ended
from vlm_vqa.errors import UserError

DEFAULT = ("training_step", "memory", "generation", "scorer", "extraction")
"""What README shows; the others take longer or need what `make repro` writes."""
KNOWN = (*DEFAULT, "features", "checks", "threads", "answers", "registering", "small_run")
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
    begin()
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in KNOWN]
    if unknown:
        parser.error(
            f"no benchmark is called {', '.join(unknown)}; there are {', '.join(KNOWN)}, and more by `python -m proofs`."
        )
    if options.draw and options.names:
        parser.error("--draw runs nothing and draws all results; leave the names out.")
    measure.check_writable(results)
    reasons = {} if options.draw else {name: run(name) for name in options.names or DEFAULT}
    failed = {name: reason for name, reason in reasons.items() if reason}
    contents = read(results)
    if not contents and not failed:
        print(f"no results in {results}; run python -m benchmarks first.", file=sys.stderr)
        return 1
    print(report(contents))
    picture.draw({name: content for name, content in contents.items() if name in DEFAULT}, results / "speed.png")
    print(f"\n{results / 'speed.png'}")
    return conclude(contents, failed)


def conclude(contents: Mapping[str, Any], failed: Mapping[str, str]) -> int:
    """Say which claims are missed and which programs failed, why; return the exit code."""
    missed = [one.what for content in contents.values() for one in claims(content) if one.met is False]
    for what in missed:
        print(f"MISSED: {what}", file=sys.stderr)
    for name, reason in failed.items():
        print(f"FAILED: {name}: {reason} Its results above, if any, are of an earlier run.", file=sys.stderr)
    return int(bool(missed or failed))


def run(name: str, package: str = "benchmarks") -> str:
    """Run one program of a package; its output goes to the terminal. Return why it failed, or nothing."""
    print(f"== {name}", flush=True)
    command, said = [sys.executable, "-m", f"{package}.{name}"], ""
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, bufsize=0) as process:
        assert process.stderr is not None
        try:
            while piece := process.stderr.read(65536):
                text = piece.decode(errors="replace")
                print(text, end="", file=sys.stderr, flush=True)
                said = (said + text)[-10_000:]
        except BaseException:
            # Ctrl-C reaches it from the terminal as well; a signal that only we got must end it too.
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
            process.terminate()
            raise
    if process.returncode == 0:
        return ""
    # What `benchmarks.end` says, or the last line of a traceback.
    lines = re.findall(rf"^{name}: (?:error: )?(.*)", said, re.MULTILINE) or said.split("\n")
    return next((line for line in lines[::-1] if line.strip()), f"it {ended(process.returncode)}.")


def read(results: Path, names: Sequence[str] = KNOWN, package: str = "benchmarks") -> dict[str, dict[str, Any]]:
    """Return what `measure.write` wrote, by the names of programs, in their order.

    Raises:
        UserError: a file is damaged.
    """
    found = {}
    for path in (results / f"{name}.json" for name in names):
        try:
            if path.is_file():
                found[path.stem] = json.loads(path.read_text(encoding="utf-8"))
                found[path.stem]["machine"], claims(found[path.stem])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: damaged ({error}). Run python -m {package} {path.stem}, or remove it.") from error
    return found


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
        parts.append(f"\n{name} ({measure.named(content.get('data'))})\n{measure.table(claims(content))}")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
