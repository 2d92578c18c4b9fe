"""What a killed `dvc` leaves half-written is put right, so that the next one works.

DVC 3.67 rewrites `.dvc/tmp/rwlock` (dvc/rwlock.py) and `dvc.lock` (dvc/utils/serialize) in place. Killed there, it leaves
them empty or cut off, and every later call refuses them. Its other locks are the system's (flock), which end with it.
"""

import json
import subprocess
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import yaml

from vlm_vqa.errors import UserError
from vlm_vqa.pipeline.orphans import gone

SECONDS_OF_CLOCK = 60  # by how much a file's time and a process's start may disagree


def project_of(folder: Path) -> Path:
    """Return the DVC project that `folder` lies in; UserError if in none."""
    for root in (folder.resolve(), *folder.resolve().parents):
        if (root / ".dvc").is_dir():
            return root
    raise UserError(f"{folder}: no .dvc here or above. Run this in the project's folder.")


def unlock(root: Path) -> list[str]:
    """Mend what a killed `dvc` has left in the project `root` and in its queue's copies; return what was done.

    UserError if a living `dvc` is at work there, or `dvc.lock` has git's marks of a conflict.
    """
    done = []
    for project in (root, *sorted(path.parents[2] for path in root.glob(".dvc/tmp/exps/*/.dvc/tmp/rwlock"))):
        done += _unlock_files(project)
    return done + _mend_dvc_lock(root)


def dvc_at_work(root: Path) -> list[psutil.Process]:
    """Return the living processes of `dvc` that work in the project `root`, or where cannot be seen."""
    found = []
    for process in psutil.process_iter():
        try:
            program, *words = [Path(word).name for word in process.cmdline()[:4]]
            # `dvc` itself, or `python /path/dvc`, `python -m dvc`; what it leaves for its statistics takes no lock.
            if (program == "dvc" or program.startswith("python") and "dvc" in words) and "daemon" not in words:
                try:
                    here = project_of(Path(process.cwd())) == root.resolve()
                except psutil.AccessDenied:
                    here = True
                if here and not gone(process):
                    found.append(process)
        except (psutil.Error, OSError, ValueError):
            # It has ended meanwhile, is the kernel's, or its folder is no project's.
            continue
    return found


def refuse_at_work(root: Path, why: str) -> None:
    """Raise UserError when a living `dvc` works in the project `root`."""
    for process in dvc_at_work(root):
        who = f"process {process.pid} (`{' '.join(process.cmdline()[1:])}`)"
        raise UserError(f"{why}, and {who} may be at work here: wait for its end, or end it, then call this again.")


@contextmanager
def _held(path: Path) -> Generator[None]:
    """Hold one of DVC's locks, as `dvc` itself does, and wait as long for it: 3 s."""
    # Here, for every stage imports this module.
    from dvc.lock import LockError, make_lock

    try:
        with make_lock(str(path)):
            yield
    except LockError:
        raise UserError(f"{path}: a living dvc holds it. Wait until it has ended.") from None


def _unlock_files(project: Path) -> list[str]:
    path = project / ".dvc/tmp/rwlock"
    if not path.exists():
        return []
    with _held(path.with_name("rwlock.lock")):
        text = path.read_bytes()
        try:
            entries = json.loads(text)
            holders = [*entries.get("write", {}).values(), *sum(entries.get("read", {}).values(), [])]
            pids = sorted({int(holder["pid"]) for holder in holders})
        except (ValueError, TypeError, KeyError, AttributeError):
            state = "empty" if not text.strip() else "half-written"
            refuse_at_work(project, f"{path} is {state}")
            with _held(project / ".dvc/tmp/lock"):
                path.unlink()
            return [f"{path}: removed; it was {state}, left so by a dvc that was killed"]
        written = path.stat().st_mtime
        if not pids or any(_lives(pid, written) for pid in pids):
            # What some living process holds, DVC itself sorts out.
            return []
        path.unlink()
        return [f"{path}: removed; process {', '.join(map(str, pids))}, which held it, was killed"]


def _lives(pid: int, written: float) -> bool:
    """Whether the process that has written its number at the time `written` lives; the number may be another's now."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return not gone(process) and process.create_time() <= written + SECONDS_OF_CLOCK
    return False


def _mend_dvc_lock(root: Path) -> list[str]:
    """Take git's copy for a `dvc.lock` cut off; what it lacks DVC finds in its cache of runs."""
    path = root / "dvc.lock"
    if not path.exists() or _is_whole(text := path.read_bytes()):
        return []
    if b"\n<<<<<<< " in b"\n" + text:
        raise UserError(f"{path}: has git's marks of a conflict. `git checkout --theirs dvc.lock`, then `dvc repro`.")
    refuse_at_work(root, f"{path} is half-written")
    with _held(root / ".dvc/tmp/lock"):
        aside = path.replace(root / ".dvc/tmp/dvc.lock.damaged")
        copy = subprocess.run(["git", "show", "HEAD:./dvc.lock"], cwd=root, capture_output=True, check=False).stdout
        if whole := _is_whole(copy):
            path.write_bytes(copy)
    done = "replaced by git's" if whole else f"moved to {aside}"
    return [f"{path}: {done}; a dvc that was killed had left it half-written ({aside})"]


def _is_whole(text: bytes) -> bool:
    """Whether a `dvc.lock` is not cut off, be it between two lines: every stage has outputs, and they stand last."""
    try:
        stages = yaml.safe_load(text)["stages"].values()
        return text.endswith(b"\n") and all("cmd" in stage and stage["outs"][-1]["path"] for stage in stages)
    except (yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError, AttributeError):
        return False
