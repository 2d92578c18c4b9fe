"""Say whether the committed dvc.lock and reports belong to the committed parameters, code and data.

    python .ci/current.py

Nothing has to be pulled or run: what is not in git (data, models) is known by its hash in dvc.lock. Exit code 0: they do;
1: they do not, and what differs is listed.
"""

import json
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

ADVICE = "Run `make repro` and commit dvc.lock and reports/ with the change that made them stale."


ABSENT = ("deleted", "not in cache")


def outputs(stage: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield path and options of what a stage of dvc.yaml writes."""
    for out in (out for kind in ("outs", "metrics", "plots") for out in stage.get(kind, [])):
        yield from out.items() if isinstance(out, Mapping) else [(out, {})]


def in_git(pipeline: Mapping[str, Any]) -> set[str]:
    """Return the outputs that dvc.yaml leaves to git."""
    stages = pipeline["stages"].values()
    return {path for stage in stages for path, how in outputs(stage) if how.get("cache") is False}


def stale(
    status: Mapping[str, list[Any]],
    lock: Mapping[str, Any],
    committed: Collection[str],
    elsewhere: Collection[str] = (),
    tracked: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """Yield what does not belong together, a line each.

    Args:
        status: what `dvc status --json` prints.
        lock: the content of dvc.lock.
        committed: the outputs that must be there, since they are in git.
        elsewhere: folders whose files are not here, so that nothing can be said of them.
        tracked: the hash that a .dvc file has of a path.
    """
    for stage, changes in status.items():
        for change in changes:
            for what, found in change.items() if isinstance(change, Mapping) else [(change, {})]:
                # Outputs that are not in git may be absent; the chain of their hashes is looked at below.
                named = {
                    path: state
                    for path, state in found.items()
                    if path in committed or state not in ABSENT and path not in elsewhere
                }
                if named or not found:
                    yield ": ".join([stage, what, *([json.dumps(named, sort_keys=True)] if named else [])])
    made = {out["path"]: out["md5"] for stage in lock["stages"].values() for out in stage["outs"]}
    for name, stage in lock["stages"].items():
        for read in stage["deps"]:
            path, md5 = read["path"], read["md5"]
            if path in made and md5 != made[path]:
                yield f"{name}: read another {path} than the one that dvc.lock says was made"
            if tracked and path in tracked and md5 != tracked[path]:
                yield f"{name}: read another {path} than the one in {path}.dvc"


def check(but: str | None = None) -> tuple[list[str], list[str]]:
    """Look at the working tree; return what is stale, and the data of which nothing here can tell.

    Args:
        but: a stage that may be stale or not have run.

    Raises:
        RuntimeError: `dvc status` failed, in its words.
    """
    pipeline = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))
    lock = yaml.safe_load(Path("dvc.lock").read_text(encoding="utf-8")) if Path("dvc.lock").is_file() else {}
    ran, names = lock.get("stages", {}), [name for name in pipeline["stages"] if name != but]
    if absent := [name for name in names if name not in ran]:
        return [f"{name}: dvc.lock holds no run of it" for name in absent], []
    status, lock = status_of(names), {"stages": {name: ran[name] for name in names}}
    made = {path for stage in pipeline["stages"].values() for path, _ in outputs(stage)}
    sources = {read["path"]: read for name in names for read in ran[name]["deps"] if read["path"] not in made}
    tracked = {path: md5 for path in sources if (md5 := _added(Path(path)))}
    elsewhere = {path for path, read in sources.items() if _is_elsewhere(path, read)}
    changes = [one for name in names for one in status.get(name, []) if isinstance(one, Mapping)]
    changed = {path for one in changes for path in one.get("changed deps", {})}
    unseen = changed & {path for path in sources if path in elsewhere or not Path(path).exists()} - tracked.keys()
    return list(stale(status, lock, in_git(pipeline), elsewhere, tracked)), sorted(unseen)


def status_of(names: Collection[str]) -> dict[str, list[Any]]:
    """Return what `dvc status --json` prints of stages; RuntimeError in its words."""
    command = [sys.executable, "-m", "dvc", "status", "--json", *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"dvc status failed:\n{done.stderr.strip()}")
    return json.loads(done.stdout)


def _added(path: Path) -> str | None:
    """Return the hash that `dvc add` or `dvc import` has noted of a path."""
    note = path.with_name(f"{path.name}.dvc")
    return yaml.safe_load(note.read_text(encoding="utf-8"))["outs"][0].get("md5") if note.is_file() else None


def _is_elsewhere(path: str, read: Mapping[str, Any]) -> bool:
    """Say whether a stage has read more files than there are here, and .gitignore keeps such files out of git."""
    here = sum(file.is_file() for file in Path(path).rglob("*"))
    command = ["git", "check-ignore", "--quiet", f"{path}/file"]
    return here < read.get("nfiles", 0) and subprocess.run(command, capture_output=True, check=False).returncode == 0


def main() -> int:
    """Print the verdict and return the exit code."""
    try:
        lines, unseen = check()
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    for line in lines:
        print(f"STALE: {line}", file=sys.stderr)
    for path in unseen:
        print(f"not here, so not looked at: {path}", file=sys.stderr)
    sys.stderr.flush()
    print(ADVICE if lines else "dvc.lock and reports/ belong to the committed parameters, code and data.")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
