"""Say whether the committed dvc.lock and reports belong to the committed parameters, code and data.

    python .ci/current.py

Nothing has to be pulled or run: what is not in git (data, models) is known by its hash in dvc.lock. Exit code 0: they do;
1: they do not, and what differs is listed.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

ADVICE = "Run `make repro` and commit dvc.lock and reports/ with the change that made them stale."


ABSENT = ("deleted", "not in cache")


def in_git(pipeline: Mapping[str, Any]) -> set[str]:
    """Return the outputs that dvc.yaml leaves to git."""
    listed = [
        out
        for stage in pipeline["stages"].values()
        for kind in ("outs", "metrics", "plots")
        for out in stage.get(kind, [])
    ]
    return {
        path for out in listed if isinstance(out, Mapping) for path, how in out.items() if how.get("cache") is False
    }


def stale(status: Mapping[str, list[Any]], lock: Mapping[str, Any], committed: set[str]) -> Iterator[str]:
    """Yield what does not belong together, a line each.

    Args:
        status: what `dvc status --json` prints.
        lock: the content of dvc.lock.
        committed: the outputs that must be there, since they are in git.
    """
    for stage, changes in status.items():
        for change in changes:
            for what, found in change.items() if isinstance(change, Mapping) else [(change, {})]:
                # Outputs that are not in git may be absent; the chain of their hashes is looked at below.
                named = {path: state for path, state in found.items() if state not in ABSENT or path in committed}
                if named or not found:
                    yield f"{stage}: {what}: {json.dumps(named, sort_keys=True)}"
    made = {out["path"]: out["md5"] for stage in lock["stages"].values() for out in stage["outs"]}
    for name, stage in lock["stages"].items():
        for read in stage["deps"]:
            if read["path"] in made and read["md5"] != made[read["path"]]:
                yield f"{name}: read another {read['path']} than the one that dvc.lock says was made"


def main() -> int:
    """Print the verdict and return the exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "status", "--json"], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        print(f"dvc status failed:\n{done.stderr.strip()}", file=sys.stderr)
        return 1
    lock, pipeline = (yaml.safe_load(Path(name).read_text(encoding="utf-8")) for name in ("dvc.lock", "dvc.yaml"))
    lines = list(stale(json.loads(done.stdout), lock, in_git(pipeline)))
    for line in lines:
        print(f"STALE: {line}", file=sys.stderr)
    sys.stderr.flush()
    print(ADVICE if lines else "dvc.lock and reports/ belong to the committed parameters, code and data.")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
