"""Content hashes: how weights, data, parameters and code are named."""

import ast
import hashlib
import json
from collections.abc import Iterable
from modulefinder import ModuleFinder
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


_PACKAGE = Path(__file__).parent
EXCEPTED = ("checks", "errors", "pipeline", "secrets", "tracking")
"""What a stage imports of this package and what decides none of its bytes: it refuses, words, logs and ends."""


def imported(file: str | Path) -> list[Path]:
    """Return the files of this package that a Python file imports, directly or not, but for `EXCEPTED`; sorted. Read from
    the sources, so imports inside functions count and nothing is run; rooms' docstrings alone do not count."""
    excepted = [f"{_PACKAGE.name}.{name}" for name in EXCEPTED]
    finder = ModuleFinder([str(_PACKAGE.parent)], excludes=excepted)
    finder.run_script(str(file))
    found = [
        Path(vars(module)["__file__"])
        for name, module in finder.modules.items()
        if name.startswith(f"{_PACKAGE.name}.")
    ]
    return sorted(path for path in found if len(ast.parse(path.read_text(encoding="utf-8")).body) > 1)


def code_hash(stage: str | Path) -> str:
    """Return one hash over a stage's file and the code that it imports: what `code` means in tags and checkpoint keys."""
    return hash_json([sha256_file(stage), hash_files(imported(stage), _PACKAGE)])


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` so that equal values give equal bytes: sorted keys, two blanks, a newline at the end."""
    Path(path).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
