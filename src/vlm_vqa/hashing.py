"""Content hashes: how weights, data, parameters and code are named."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def sha256_bytes(data: bytes) -> str:
    """Return the SHA-256 of `data` in hex."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes in hex, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(value: Any) -> str:
    """Return the SHA-256 of `value` as canonical JSON (sorted keys, no blanks)."""
    return sha256_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def hash_files(paths: Iterable[str | Path], root: str | Path) -> str:
    """Return one hash over files: their names relative to `root`, sorted, and their contents."""
    root = Path(root)
    return hash_json(sorted((Path(path).relative_to(root).as_posix(), sha256_file(path)) for path in paths))


CODE = ("cores.py", "data", "files.py", "hashing.py", "model", "params.py", "training")
"""The parts of this package that decide trained weights; `dvc.yaml` names the same for the train stage."""


def code_hash(stage: str | Path) -> str:
    """Return one hash over the code that decides trained weights: what `code` means in tags and checkpoint keys.

    Evaluation and tracking change no weights, so they do not count.

    Args:
        stage: the stage's own file.
    """
    package = Path(__file__).parent
    places = [package / name for name in CODE]
    files = [file for place in places for file in (place.rglob("*.py") if place.is_dir() else [place])]
    return hash_json([sha256_file(stage), hash_files(files, package)])


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` so that equal values give equal bytes: sorted keys, two blanks, a newline at the end."""
    Path(path).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
