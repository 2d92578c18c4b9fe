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


def code_hash() -> str:
    """Return one hash over the code that decides trained weights: what `code` means in tags and checkpoint keys.

    The same places stand in `dvc.yaml` as dependencies of the train stage; evaluation and tracking change no weights.
    """
    package = Path(__file__).parent
    folders = [package / name for name in ("data", "model", "training")]
    return hash_files([package / "params.py", *(file for folder in folders for file in folder.rglob("*.py"))], package)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` so that equal values give equal bytes: sorted keys, two blanks, a newline at the end."""
    Path(path).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
