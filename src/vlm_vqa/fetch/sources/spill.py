"""Pictures that stand in a table as bytes: each is written out once, as a file, and the rows beside them as JSON lines.

What each Parquet file gives is a part: a folder that gets its name when it is whole, so that who is interrupted goes on with
the first part that is missing.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from vlm_vqa.errors import UserError
from vlm_vqa.hashing import sha256_bytes
from vlm_vqa.sealed import aside, flush

_NAME = re.compile(r"\w[\w .()+,=-]{0,120}")
"""File names that mean the same everywhere."""


@dataclass
class Spill:
    """Writes parts, and each picture once for all of them."""

    folder: Path
    progress: tqdm
    written: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Of all parts so far: SHA-256 and file name, by that name in small letters."""

    @property
    def images(self) -> Path:
        """The folder of the pictures."""
        return self.folder / "images"

    def skip(self, part: Path) -> None:
        """Take notice of a part that is there."""
        self.written |= json.loads((part / "images").read_text())
        with open(part / "rows.jsonl", "rb") as lines:
            self.progress.update(sum(1 for _ in lines))

    def write(self, rows: Iterable[dict[str, Any]], column: str, part: Path, where: str) -> None:
        """Write rows whose `column` holds pictures; nothing of them counts before all of them are there."""
        before, names = self.progress.n, dict[str, None]()
        self.images.mkdir(parents=True, exist_ok=True)
        part.parent.mkdir(exist_ok=True)
        try:
            with aside(part) as unfinished:
                unfinished.mkdir()
                with open(unfinished / "rows.jsonl", "w", encoding="utf-8") as file:
                    for number, row in enumerate(rows, 1):
                        name = self._image(row[column], f"{where}: row {number}")
                        names[name] = None
                        # What is no JSON is no text either: for the contract to refuse by name.
                        file.write(json.dumps(row | {column: name}, default=repr) + "\n")
                        self.progress.update()
                (unfinished / "images").write_text(
                    json.dumps({name.lower(): self.written[name.lower()] for name in names})
                )
                # They count with the part, so they must be on the disk before it.
                for path in (*map(self.images.joinpath, names), self.images):
                    flush(path)
        except BaseException:
            self.progress.update(before - self.progress.n)
            raise

    def _image(self, value: Any, where: str) -> str:
        """Write a picture unless it is there; return its file's name: its own, if no other picture has that."""
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if not isinstance(data, bytes):
            raise UserError(f"{where} comes without the bytes of its image. Name a table that holds them in every row.")
        sha256, name = sha256_bytes(data), PurePosixPath(path or "").name
        if not _NAME.fullmatch(name) or self.written.get(name.lower(), [sha256])[0] != sha256:
            name = sha256[:32]
        if name.lower() not in self.written:
            (self.images / name).write_bytes(data)
            self.written[name.lower()] = (sha256, name)
        return self.written[name.lower()][1]
