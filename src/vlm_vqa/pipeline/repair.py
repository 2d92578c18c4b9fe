"""Stage outputs are read whole and compared with `dvc.lock`; what is damaged is removed, from DVC's cache too.

DVC alone cannot: it trusts a read-only object of its cache unread, and a file's hash for as long as the file's inode, time
and size stay. With links, the file in the project is the cache's own, so `dvc repro --force` links the damaged one back.
"""

import json
import os
import shutil
import subprocess
import time
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import md5
from pathlib import Path

from dvc.exceptions import DvcException
from dvc.output import Output
from dvc.repo import Repo
from dvc_data.hashfile.hash import file_md5
from dvc_data.hashfile.tree import Tree
from tqdm import tqdm

from vlm_vqa import sealed
from vlm_vqa.errors import UserError
from vlm_vqa.pipeline.unlock import refuse_at_work, unlock

_FOREIGN = "no part of the stage's output: move it away, DVC would delete it"


@dataclass(frozen=True)
class Fault:
    """A file that is not what `dvc.lock` records."""

    stage: str
    path: Path
    what: str
    content: Path | bytes | None = None  # what it should hold, where that is known
    lost: bool = True  # whether only running the stage brings it back

    def __str__(self) -> str:
        return f"{self.stage}: {os.path.relpath(self.path)}: {self.what}"


def _md5(path: Path) -> str | None:
    with suppress(OSError):
        return file_md5(str(path))
    return None


@contextmanager
def recorded(root: Path, stages: Sequence[str]) -> Generator[list[Output]]:
    """Give the stages' outputs that `dvc.lock` records, all by default; UserError if DVC cannot, or has no such stage."""
    try:
        with Repo(str(root)) as repo:
            known = {stage.addressing: stage for stage in repo.index.stages}
            if unknown := sorted(set(stages) - known.keys()):
                raise UserError(f"dvc.yaml has no stage {', '.join(unknown)}, but {', '.join(known)}.")
            yield [out for name in stages or known for out in known[name].outs if out.hash_info.name == "md5"]
    except DvcException as error:
        raise UserError(f"{error}. If a dvc was killed here, run `vlm-vqa unlock`.") from error


def verify(outs: Sequence[Output]) -> list[Fault]:
    """Read every byte of the outputs, and of their objects in DVC's cache, and return what is not as recorded."""
    # Each file is read once, however many links it has.
    links = defaultdict(set)
    for path in (path for out in outs for path in (*_files(out), *_objects(out)) if path.is_file()):
        links[path.stat().st_dev, path.stat().st_ino].add(path)
    sizes, hashes = [next(iter(same)).stat().st_size for same in links.values()], {}
    with ThreadPoolExecutor() as pool, tqdm(total=sum(sizes), desc="verify", unit="B", unit_scale=True) as bar:
        values = pool.map(lambda same: _md5(next(iter(same))), links.values())
        for same, size, value in zip(links.values(), sizes, values, strict=True):
            hashes |= dict.fromkeys(same, value)
            bar.update(size)
    return [fault for out in outs for fault in _faults(out, hashes)]


def _files(out: Output) -> list[Path]:
    path = Path(out.fs_path)
    if path.is_dir():
        return sorted(found for found in path.rglob("*") if not found.is_dir())
    return [path] if path.exists() else []


def _object(out: Output, value: str) -> Path:
    return Path(out.cache.oid_to_path(value))


def _listing(out: Output) -> dict[str, str] | None:
    """Return relative path -> hash of an output's files, as the cache's list says; None where that is damaged."""
    assert out.hash_info is not None and out.hash_info.value is not None, "`recorded` leaves such outputs out"
    value = out.hash_info.value
    if not out.hash_info.isdir:
        return {".": value}
    record = _object(out, value)
    if not record.is_file() or f"{_md5(record)}.dir" != value:
        return None
    return {entry["relpath"]: entry["md5"] for entry in json.loads(record.read_bytes())}


def _objects(out: Output) -> list[Path]:
    """Return the objects of the cache that an output may be linked to: without its list, any."""
    if (listing := _listing(out)) is not None:
        return [_object(out, value) for value in listing.values()]
    return [path for path in Path(out.cache.path).glob("??/*") if path.is_file()] if out.use_cache else []


def _in_git(out: Output) -> dict[str, bytes]:
    """Return relative path -> content of an output's files as committed, nothing where DVC's cache keeps them."""
    if out.use_cache:
        return {}
    assert out.repo is not None, "`recorded` has it from a repository"
    root = out.repo.root_dir

    def git(*words: str) -> bytes:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, check=False).stdout

    path = os.path.relpath(out.fs_path, root)
    names = git("ls-tree", "-rz", "--name-only", "HEAD", path).decode().split("\0")[:-1]
    return {os.path.relpath(name, path): git("show", f"HEAD:./{name}") for name in names}


def _md5_of(content: bytes) -> str:
    return md5(content, usedforsecurity=False).hexdigest()


def _tree(hashes: Mapping[str, str | None]) -> Tree:
    tree = Tree.from_list([{"relpath": name, "md5": value} for name, value in hashes.items()])
    tree.digest()
    return tree


def _faults(out: Output, hashes: Mapping[Path, str | None]) -> Iterator[Fault]:
    assert out.hash_info is not None and out.hash_info.value is not None, "`recorded` leaves such outputs out"
    folder, record, stage = Path(out.fs_path), _object(out, out.hash_info.value), out.stage.addressing
    if (listing := _listing(out)) is None:
        here = {path.relative_to(folder).as_posix(): hashes.get(path) for path in _files(out)}
        committed = {name: _md5_of(content) for name, content in _in_git(out).items()}
        listing = next((one for one in (here, committed) if _tree(one).hash_info == out.hash_info), None)
        if listing is None:
            # DVC runs a stage whose list is missing, or whose folder is where only git keeps it.
            lost = folder if folder.exists() and not out.use_cache else record
            yield Fault(stage, lost, f"DVC's list of the files of {folder.name} is damaged or missing, and some differ")
            for path in _objects(out):
                if hashes.get(path) != (path.parent.name + path.name).removesuffix(".dir"):
                    yield Fault(stage, path, "damaged in DVC's cache")
            return
        if out.use_cache:
            yield Fault(stage, record, "DVC's list of files is damaged", _tree(listing).as_bytes(), lost=False)
    for name, value in listing.items():
        path, stored = folder / name, _object(out, str(value))
        here, there = hashes.get(path) == value, hashes.get(stored) == value
        if not here:
            committed = _in_git(out).get(name, b"")
            known = committed if _md5_of(committed) == value else None
            what = "damaged" if path.exists() else "missing"
            yield Fault(stage, path, what, known, lost=known is None and not there)
        # What git keeps needs no object.
        if not there and (out.use_cache or stored.exists()):
            what = f"{'damaged' if stored.exists() else 'missing'} in DVC's cache ({path.name})"
            yield Fault(stage, stored, what, path if here else None, lost=not here)
    for path in set(_files(out)) - {folder / name for name in listing}:
        yield Fault(stage, path, _FOREIGN)


def repair(root: Path, stages: Sequence[str], run: bool = True) -> int:
    """Remove what is damaged of the stages' outputs, bring it back and return the exit code of `dvc repro`.

    From whole objects of DVC's cache, from whole files in the project or from git; what none of them has is made again.
    UserError if a living `dvc` is at work here, or a file lies in an output that is no part of it.
    """
    for line in unlock(root):
        print(line)
    refuse_at_work(root, "outputs can only be repaired while no stage runs")
    with recorded(root, stages) as outs:
        faults = verify(outs)
        for fault in faults:
            if fault.what == _FOREIGN:
                raise UserError(f"{fault}. Then call this again.")
        for fault in faults:
            print(f"{fault}: {_mend(fault)}")
    lost = {fault.stage for fault in faults if fault.lost}
    linked = {fault.stage for fault in faults} - lost
    if linked and (code := _dvc(root, "checkout", *sorted(linked))):
        return code
    if not faults:
        print("Every file is what dvc.lock records. If it is wrong all the same, mend the cause, then make it anew by")
        print("`dvc repro --force --single-item STAGE`.")
    again = list(dict.fromkeys([*stages, *sorted(lost)]))
    return _dvc(root, "repro", *again) if again and run else 0


def _dvc(root: Path, *words: str) -> int:
    print("dvc", *words, flush=True)
    return subprocess.run(["dvc", *words], cwd=root, check=False).returncode


def _mend(fault: Fault) -> str:
    """Remove a damaged file or write it anew, and say so; a folder of which nothing is known is only moved away."""
    path = fault.path
    if path.is_dir():
        aside = path.rename(path.with_name(f"{path.name}.damaged-{time.time():.0f}"))
        return f"moved to {aside.name}"
    path.unlink(missing_ok=True)
    if fault.content is None:
        return "removed"
    path.parent.mkdir(parents=True, exist_ok=True)
    with sealed.aside(path) as part:
        if isinstance(fault.content, bytes):
            part.write_bytes(fault.content)
        else:
            shutil.copyfile(fault.content, part)
    return "written anew"
