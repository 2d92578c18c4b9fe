"""Pictures that stand in a table as bytes: each is written out once, as a file, and its row names it instead."""

import re
from pathlib import Path, PurePosixPath
from typing import Any

from vlm_vqa.fetch.contract import MalformedRecord, ViolationKind
from vlm_vqa.hashing import sha256_bytes

_NAME = re.compile(r"\w[\w .()+,=-]{0,120}")  # file names that mean the same everywhere


class Spill:
    """Writes pictures into `folder`, each once for all tables."""

    def __init__(self, folder: Path):
        self.folder = folder
        # SHA-256 and file name, by that name in small letters.
        self._written: dict[str, tuple[str, str]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def name(self, value: Any) -> str:
        """Write the picture of a cell unless it is there; return its file's name: its own, if no other picture has that."""
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if not isinstance(data, bytes):
            lacking = "comes without the bytes of its image; name a table that holds them in every row"
            raise MalformedRecord(ViolationKind.BAD_ROW, lacking)
        sha256, name = sha256_bytes(data), PurePosixPath(path or "").name
        if not _NAME.fullmatch(name) or self._written.get(name.lower(), [sha256])[0] != sha256:
            name = sha256[:32]
        if name.lower() not in self._written:
            (self.folder / name).write_bytes(data)
            self._written[name.lower()] = (sha256, name)
        return self._written[name.lower()][1]
