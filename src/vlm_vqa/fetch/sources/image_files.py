"""Pictures by name, in one or several folders and zip archives: exactly, else as people mean the name.

Names from strangers' tables are looked up in an index of what is there, so no name leads out of it.
"""

import difflib
import lzma
import os
import re
import unicodedata
import zipfile
import zlib
from bisect import bisect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from vlm_vqa.errors import UserError
from vlm_vqa.fetch.sources.zip_archive import files, open_zip, parts
from vlm_vqa.files import check_regular

ENCRYPTED = 0x1
"""Of a zip member's flags (APPNOTE 4.4.4)."""
# Reading a damaged member, zipfile raises its own error and those of its decompressors (bz2's is an OSError, which readers
# expect anyway); EOFError where the bytes end early; NotImplementedError for a compression method that Python lacks;
# ValueError for a ZIP64 offset that no file has, and as UnicodeDecodeError for a name that is not UTF-8 though flagged so.
DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, ValueError)
_OTHERS = {(257, b"ustar"): "tar", (0, b"\x1f\x8b"): "gzip", (0, b"7z\xbc\xaf"): "7z", (0, b"Rar!"): "rar"}
_URL = re.compile(r"(?i)[a-z][a-z0-9+.-]+://|data:")
_NEAREST, _NEIGHBOURS = 3, 20
_HINTS = 50
"""Missing images that are told the nearest names: a message shows fewer, and a wrong path makes every one missing."""


class MissingImage(Exception):
    """There is no such image: where it was looked for, and what is there instead."""

    def __init__(self, where: str, hint: str):
        super().__init__(where)
        self.hint = hint


class _Found(NamedTuple):
    """A file that is there."""

    place: int
    """Of its folder or archive among those given."""
    path: str
    """Below it, with slashes."""
    member: zipfile.ZipInfo | None = None


class ImageFiles:
    """Image files by name, below folders and inside zip archives. Reads from several threads.

    The first of these that holds: the path is the name; the file's name is the last part of the name, in any folder;
    but for case, and how an accent is written (macOS); but for the ending. Among several of one kind the one whose folders
    agree with the name's; a file in a folder that the name contradicts is none, and one in a hidden folder comes last.
    """

    def __init__(self, paths: Sequence[Path]):
        """Look through `paths`.

        Raises:
            OSError, zipfile.BadZipFile: one is neither a folder nor a zip archive of files below it, as `open_zip` says.
        """
        self.paths = tuple(paths)
        self.others: list[ImageFiles] = []
        """Those of other splits, where a missing image may be."""
        self._zips: list[zipfile.ZipFile | None] = []
        self._index: dict[str, _Found | list[_Found]] = {}
        """Files by their names in one spelling, without ending."""
        self._folders: set[str] = set()
        self._hints, self._sorted = 0, ((), ())
        self._count = 0
        try:
            for place, path in enumerate(self.paths):
                self._zips.append(None if path.is_dir() else _open_zip(path))
                for found in self._of_folder(place, path) if path.is_dir() else self._of_zip(place):
                    folders, _, name = found.path.rpartition("/")
                    self._folders.add(folders.rpartition("/")[2])
                    key = _spelled(os.path.splitext(name)[0])
                    if (there := self._index.setdefault(key, found)) is not found:
                        self._index[key] = [*(there if isinstance(there, list) else [there]), found]
        except BaseException:
            self.close()
            raise

    def read(self, name: str, max_bytes: int) -> bytes:
        """Return a file's bytes.

        Raises:
            MissingImage: there is no such file.
            UserError: several are meant; it is larger than `max_bytes`, or encrypted, damaged or of an unknown compression
                inside the archive; or `name` is a URL.
            OSError: it cannot be read.
        """
        found = self._find(name)
        path, where = self.paths[found.place] / found.path, self._where(found)
        size = path.stat().st_size if found.member is None else found.member.file_size
        if size > max_bytes:
            raise UserError(f"{where}: {size} bytes are too many for an image of data.max_image_pixels")
        if (archive := self._zips[found.place]) is None or found.member is None:
            check_regular(path, max_bytes)
            return path.read_bytes()
        # zipfile would raise a bare RuntimeError, which could be anything.
        if found.member.flag_bits & ENCRYPTED:
            raise UserError(f"{where}: is encrypted; unpack the archive with its password and name the folder instead")
        try:
            return archive.read(found.member)
        except DAMAGE as error:
            raise UserError(f"{where}: cannot be unpacked ({error})") from error

    def count(self) -> int:
        """Return how many files there are."""
        return self._count

    def where(self, name: str) -> str:
        """Return the place of a file, or where it would be, for messages."""
        try:
            return self._where(self._find(name, hint=False))
        except (MissingImage, UserError):
            return self._missing(name)

    def file_name(self, name: str) -> str:
        """Return the name that the file has where it lies."""
        return self._find(name).path.rpartition("/")[2]

    def close(self) -> None:
        """Close the archives."""
        for archive in self._zips:
            if archive is not None:
                archive.close()

    def _of_folder(self, place: int, top: Path) -> Iterator[_Found]:
        """Yield all that is no folder: what cannot be read is said when it is wanted."""
        left, seen = [""], set()
        while left:
            folder = left.pop()
            here = os.stat(top / folder)
            if (here.st_dev, here.st_ino) in seen:
                continue
            seen.add((here.st_dev, here.st_ino))
            with os.scandir(top / folder) as entries:
                for entry in entries:
                    path = f"{folder}/{entry.name}" if folder else entry.name
                    if _is(entry, os.DirEntry.is_dir):
                        left.append(path)
                    else:
                        self._count += _is(entry, os.DirEntry.is_file)
                        yield _Found(place, path)

    def _of_zip(self, place: int) -> Iterator[_Found]:
        for info in files(self._zips[place]):
            self._count += 1
            yield _Found(place, "/".join(parts(info.filename)), info)

    def _find(self, name: str, hint: bool = True) -> _Found:
        """Return the one file that `name` means."""
        if _URL.match(name):
            raise UserError(f"{name:.200}: a URL, not a file. Download the images, and put their names into the data")
        *folders, last = parts(name.strip()) or [""]
        path = "/".join([*folders, last])
        if isinstance(one := self._index.get(_spelled(os.path.splitext(last)[0])), _Found) and one.path == path:
            return one
        ranked: dict[tuple[int, int], list[_Found]] = {}
        for key in dict.fromkeys((os.path.splitext(last)[0], last)):
            there = self._index.get(_spelled(key), [])
            for found in there if isinstance(there, list) else [there]:
                *above, own = found.path.split("/")
                agree = len(os.path.commonprefix([above[::-1], folders[::-1]]))
                if agree < min(len(above), len(folders)) and folders[-1 - agree] in self._folders:
                    continue
                kinds = (found.path != path, own != last, _spelled(own) != _spelled(last), key == last)
                hidden = any(part.startswith(".") for part in above)
                kind = next((rank for rank, differs in enumerate(kinds) if not differs), len(kinds))
                ranked.setdefault((kind, hidden - agree), []).append(found)
        if not ranked:
            raise MissingImage(self._missing(name), self._hint(name, last) if hint else "")
        best = ranked[min(ranked)]
        if len(best) > 1:
            raise UserError(f"{name!r}: {len(best)} files are meant ({' and '.join(map(self._where, best[:3]))})")
        return best[0]

    def _where(self, found: _Found) -> str:
        path = self.paths[found.place]
        return f"{path / found.path}" if found.member is None else f"{path}: {found.member.filename}"

    def _missing(self, name: str) -> str:
        return f"{self.paths[0] / name}" if self.paths and self._zips[0] is None else f"{self.paths[0]}: {name}"

    def _hint(self, name: str, last: str) -> str:
        """Return where it is, or the nearest of the names that begin or end alike; comparing with all takes seconds."""
        self._hints += 1
        if self._hints > _HINTS:
            return ""
        for other in self.others:
            try:
                there = other._where(other._find(name, hint=False))
            except (MissingImage, UserError):
                continue
            return f"; it is {there}: make data.SPLIT.images a list of both places"
        if not self._index:
            return "; there are no files"
        if not self._sorted[0]:
            self._sorted = (sorted(self._index), sorted(key[::-1] for key in self._index))
        key, near = _spelled(os.path.splitext(last)[0]), []
        for names, step in zip(self._sorted, (1, -1), strict=True):
            at = bisect(names, key[::step])
            near += [other[::step] for other in names[max(at - _NEIGHBOURS, 0) : at + _NEIGHBOURS]]
        found = [self._index[other] for other in difflib.get_close_matches(key, dict.fromkeys(near), _NEAREST, 0)]
        names = [one[0].path if isinstance(one, list) else one.path for one in found]
        return f"; the nearest of {self._count:,} files: {', '.join(map(repr, names))}"


def _open_zip(path: Path) -> zipfile.ZipFile:
    """Open an archive, or say what it is instead."""
    check_regular(path, 2**63)
    with open(path, "rb") as file:
        head = file.read(512)
    for (at, magic), kind in _OTHERS.items():
        if head[at:].startswith(magic):
            raise zipfile.BadZipFile(f"it is a {kind} archive; unpack it and name the folder")
    return open_zip(path)


def _spelled(name: str) -> str:
    """Return a name in one spelling: case, and how an accent is written, do not count."""
    return name.casefold() if name.isascii() else unicodedata.normalize("NFC", name).casefold()


def _is(entry: os.DirEntry, kind) -> bool:
    try:
        return kind(entry)
    except OSError:
        # A link that leads to itself.
        return False
