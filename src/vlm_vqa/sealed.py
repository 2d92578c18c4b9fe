"""Stored bytes are checked before they are used: sealed JSON, files by SHA-256, large ones by checksums of their blocks.

A seal is a hash of the JSON's own content, so it finds damage, not forgery. What is not complete has a name that ends in
`.part`; `publish` gives it its own name, once it is on the disk.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import xxhash
from fsspec.spec import AbstractBufferedFile

from vlm_vqa.errors import UserError
from vlm_vqa.files import check_regular
from vlm_vqa.hashing import hash_json, sha256_file, write_json

PART = ".part"
SWITCH = "VLM_VQA_BLOCK_CHECKS"
SEAL = "seal"
BLOCK_BYTES = 2**20
_DIGITS = 16  # of a block's checksum: 64 bits in hex
_THREADS = 8


def checks_blocks() -> bool:
    """Whether records and features are compared with their checksums as they are read; `off` in the variable ends it."""
    return os.environ.get(SWITCH, "").lower() not in ("off", "0", "false", "no")


def checksum(data: Any, seed: int = 0) -> int:
    """Return the XXH3 of bytes, 64 bits: as fast as memory, and no two of a billion damaged blocks pass."""
    return xxhash.xxh3_64_intdigest(data, seed)


@contextmanager
def aside(target: Path) -> Generator[Path]:
    """Yield `TARGET.part`, where a file or folder is to be made: published if the block succeeds, removed if it fails."""
    with scratch(target.with_name(target.name + PART)) as part:
        yield part
        publish(part, target)


@contextmanager
def scratch(part: Path) -> Generator[Path]:
    """Yield a path of which nothing is there before, nor afterwards."""
    _remove(part)
    try:
        yield part
    finally:
        _remove(part)


def publish(part: Path, target: Path) -> None:
    """Rename a complete file or folder, flushed to the disk; what stood there is replaced, never written through."""
    for path in (*part.rglob("*"), part):
        flush(path)
    if part.is_dir():
        _remove(target)
    os.replace(part, target)
    flush(target.parent)


def flush(path: Path) -> None:
    """Force a file or a folder's entries to the disk: who loses power must not keep the seal and lose the rest."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Publish JSON with a seal."""
    with aside(path) as part:
        write_json(part, {**content, SEAL: hash_json(content)})


def find_sealed(path: Path) -> dict[str, Any] | None:
    """Return what `write_sealed` was given, or None where `read_sealed` would raise."""
    with suppress(UserError):
        return read_sealed(path, "sealed", "")
    return None


def read_sealed(path: Path, what: str, remedy: str) -> dict[str, Any]:
    """Return what `write_sealed` was given; UserError if it is missing, damaged, or unsealed as those of earlier
    versions, with `what` it should hold and, in a sentence, the next step, `remedy`."""
    try:
        check_regular(path)
        content = json.loads(path.read_text(encoding="utf-8"))
        seal = content.pop(SEAL)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). {remedy}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = "it has no seal" if isinstance(error, KeyError) else repr(error)
        raise UserError(f"{path}: not {what} of this version ({reason}). {remedy}") from error
    if seal != hash_json(content):
        raise UserError(f"{path}: damaged: its content is not what was sealed. {remedy}")
    return content


def write_folder(path: Path, content: Mapping[str, Any], more: Iterable[Path] = ()) -> None:
    """Seal `content` together with the SHA-256 of every file beside and below `path`, and of `more`."""
    there = (*path.parent.rglob("*"), *more)
    files = [file for file in there if file.is_file() and file != path and file.suffix != PART]
    hashes = {Path(os.path.relpath(file, path.parent)).as_posix(): sha256_file(file) for file in files}
    write_sealed(path, {**content, "files": dict(sorted(hashes.items()))})


def read_folder(path: Path, what: str, remedy: str) -> dict[str, Any]:
    """Return what `write_folder` was given; UserError names the first file that is missing or not as it was sealed."""
    content = read_sealed(path, what, remedy)
    hashes = content.pop("files")
    with ThreadPoolExecutor(_THREADS) as pool:
        files = [Path(os.path.normpath(path.parent / name)) for name in hashes]
        found = pool.map(lambda file: sha256_file(file) if file.is_file() else None, files)
        for file, expected, value in zip(files, hashes.values(), found, strict=True):
            if value != expected:
                state = "missing" if value is None else "damaged: its SHA-256 is not the one that was sealed"
                raise UserError(f"{file}: {state}. {remedy}")
    return content


def fingerprint(path: Path) -> dict[str, Any]:
    """Return a file's `bytes`, its `sha256`, and `blocks`: the checksums of its MiBs, one after another."""
    sha256, blocks = hashlib.sha256(), []
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            sha256.update(block)
            blocks.append(f"{checksum(block):0{_DIGITS}x}")
    return {"bytes": path.stat().st_size, "sha256": sha256.hexdigest(), "blocks": "".join(blocks)}


def open_checked(path: Path, made: Mapping[str, Any], remedy: str) -> io.IOBase:
    """Open a file of which every block is compared with its checksum in `made`, its `fingerprint`, when it is read.
    UserError if it has another size, and on reading if a block is damaged; OSError if it cannot be opened."""
    found = path.stat().st_size
    if found != made["bytes"]:
        raise UserError(f"{path}: has {found} bytes where {made['bytes']} were written. {remedy}")
    return _CheckedFile(path, made["blocks"], remedy) if checks_blocks() else open(path, "rb")


class _CheckedFile(AbstractBufferedFile):
    def __init__(self, path: Path, blocks: str, remedy: str):
        super().__init__(None, path, cache_type="none", size=path.stat().st_size)
        self._blocks, self._remedy, self._file = blocks, remedy, open(path, "rb", buffering=0)
        # Small reads stand side by side.
        self._block = lru_cache(maxsize=1)(self._read_block)

    def _fetch_range(self, start: int, end: int) -> bytes:
        numbers = range(start // BLOCK_BYTES, -(-min(end, self.size) // BLOCK_BYTES))
        return b"".join(map(self._block, numbers))[start % BLOCK_BYTES :][: end - start]

    def _read_block(self, number: int) -> bytes:
        block = os.pread(self._file.fileno(), BLOCK_BYTES, number * BLOCK_BYTES)
        if f"{checksum(block):0{_DIGITS}x}" != self._blocks[number * _DIGITS : (number + 1) * _DIGITS]:
            raise damaged(self.path, number * BLOCK_BYTES, self._remedy)
        return block

    def close(self) -> None:
        self._file.close()
        super().close()


def damaged(path: Path, offset: int, remedy: str) -> UserError:
    """Return the error for bytes at `offset` that are not those that were written."""
    return UserError(f"{path}: damaged at byte {offset:,} or after it: its checksum is another. {remedy}")
