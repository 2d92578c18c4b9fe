"""Content hashes: how weights, data, parameters and code are named."""

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator
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


EXCEPTED = ("__init__", "checks", "errors", "pipeline", "secrets", "tracking")
"""What a stage imports of this package and what decides none of its bytes: it refuses, words, logs and ends."""


def imported(file: str | Path) -> list[Path]:
    """Return the files of this package that a Python file imports, directly or not, but for `EXCEPTED`; sorted.

    Read from the sources, so imports inside functions count and nothing is run. `dvc.yaml` names the same for each stage.
    """
    found: set[Path] = set()
    left = [Path(file)]
    while left:
        tree = ast.parse(left.pop().read_text(encoding="utf-8"))
        for name in _imports(tree):
            new = _module(name)
            if new is not None and new not in found:
                found.add(new)
                left.append(new)
    return sorted(found)


def _imports(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted names that may be modules of this package, their packages too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            yield from (".".join(parts[:count]) for count in range(2, len(parts) + 1) if parts[0] == _PACKAGE.name)


def _module(name: str) -> Path | None:
    """Return a module's file, None where there is none or it decides nothing: excepted, or a room's docstring alone."""
    path = _PACKAGE.parent.joinpath(*name.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not file.is_file() or file.relative_to(_PACKAGE).parts[0].removesuffix(".py") in EXCEPTED:
        return None
    return file if file.stem != "__init__" or len(ast.parse(file.read_text(encoding="utf-8")).body) > 1 else None


_PACKAGE = Path(__file__).parent


def code_hash(stage: str | Path) -> str:
    """Return one hash over a stage's file and the code that it imports: what `code` means in tags and checkpoint keys."""
    return hash_json([sha256_file(stage), hash_files(imported(stage), _PACKAGE)])


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` so that equal values give equal bytes: sorted keys, two blanks, a newline at the end."""
    Path(path).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
