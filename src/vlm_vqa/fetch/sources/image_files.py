"""Pictures by name, in folders and zip archives: exactly, else as people mean the name. Names from strangers' tables are
looked up in an index of what is there, so no name leads out of it."""

import difflib
import lzma
import os
import re
import unicodedata
import zipfile
import zlib
from bisect import bisect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

from vlm_vqa.errors import UserError
from vlm_vqa.fetch.recognise import PICTURES
from vlm_vqa.fetch.sources.zip_archive import files, open_zip, parts
from vlm_vqa.files import check_regular

ENCRYPTED = 0x1  # of a zip member's flags (APPNOTE 4.4.4)
# Reading a damaged member, zipfile raises its own error and those of its decompressors (bz2's is an OSError, which readers
# expect anyway); EOFError where the bytes end early; NotImplementedError for a compression method that Python lacks, and for
# patched or strongly encrypted data; ValueError for an offset that no file has, and for a name that is no UTF-8.
DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, ValueError)
_OTHERS = {(257, b"ustar"): "tar", (0, b"\x1f\x8b"): "gzip", (0, b"7z\xbc\xaf"): "7z", (0, b"Rar!"): "rar"}
_URL = re.compile(r"(?i)[a-z][a-z0-9+.-]+://|data:")
_ENDINGS = ("", *PICTURES)
_NEAREST, _NEIGHBOURS = 3, 20
_HINTS = 50  # missing images that are told the nearest names: a wrong path makes every one missing


class MissingImage(Exception):
    """There is no such image; `args` are where it was looked for, and what is there instead."""


class _Found(NamedTuple):
    """A file that is there: its folder or archive, its path below that with slashes, and where it is in the archive."""

    top: Path
    path: str
    archive: zipfile.ZipFile | None = None
    member: zipfile.ZipInfo | None = None

    @property
    def where(self) -> str:
        return f"{self.top}: {self.member.filename}" if self.member else f"{self.top / self.path}"


class ImageFiles(ExitStack):
    """Image files by name, below folders and inside zip archives until it is closed. Reads from several threads.

    The first of these that holds: the path is the name; the file's name is the last part of the name, in any folder; but for
    case, and how an accent is written (macOS); but for the ending. Among several of one kind the one whose folders agree
    with the name's; a file in a folder that the name contradicts is none, and one in a hidden folder comes last.
    """

    def __init__(self, paths: Sequence[Path]):
        """Look through `paths`; raise as `open_zip`, and `UserError` for an archive of another kind."""
        super().__init__()
        self.others: list[ImageFiles] = []  # those of other splits, where a missing image may be
        self.count = 0
        self._top = paths[0]
        # Files by their names in one spelling, without ending.
        self._index: dict[str, tuple[_Found, ...]] = {}
        self._folders: set[str] = set()
        self._hints, self._sorted = 0, ()
        for path in paths:
            for found in _of_folder(path) if path.is_dir() else _of_zip(path, self):
                folders, _, name = found.path.rpartition("/")
                self._folders.add(folders.rpartition("/")[2])
                self.count += 1
                key = _spelled(os.path.splitext(name)[0])
                self._index[key] = (*self._index.get(key, ()), found)

    def read(self, name: str, max_bytes: int) -> bytes:
        """Return the bytes of the file that `find` finds. UserError if it is larger than `max_bytes`, or encrypted,
        damaged or of an unknown compression inside the archive; OSError if it cannot be read."""
        top, path, archive, member = found = self.find(name)
        size = (top / path).stat().st_size if member is None else member.file_size
        if size > max_bytes:
            raise UserError(f"{found.where}: {size} bytes are too many for an image of data.max_image_pixels")
        if archive is None or member is None:
            check_regular(top / path, max_bytes)
            return (top / path).read_bytes()
        # zipfile would raise a bare RuntimeError, which could be anything.
        if member.flag_bits & ENCRYPTED:
            raise UserError(f"{found.where}: is encrypted; unpack the archive with its password and name the folder")
        try:
            return archive.read(member)
        except DAMAGE as error:
            raise UserError(f"{found.where}: cannot be unpacked ({error})") from error

    def find(self, name: str, hint: bool = True) -> _Found:
        """Return the one file that `name` means. MissingImage if there is none, UserError if there are several, or for a
        URL."""
        if _URL.match(name):
            raise UserError(f"{name:.200}: a URL, not a file. Download the images, and put their names into the data")
        *folders, last = parts(name.strip()) or [""]
        path, (stem, ending) = "/".join([*folders, last]), os.path.splitext(last)
        ranked: dict[tuple[int, int], list[_Found]] = {}
        for key in {stem, last}:
            for found in self._index.get(_spelled(key), ()):
                *above, own = found.path.split("/")
                agree = len(os.path.commonprefix([above[::-1], folders[::-1]]))
                against = agree < min(len(above), len(folders)) and folders[-1 - agree] in self._folders
                kinds = [found.path == path, own == last, _spelled(own) == _spelled(last)]
                if os.path.splitext(own)[1].lower() in _ENDINGS:
                    kinds += [key == (stem if ending.lower() in _ENDINGS else last), key == last]
                if any(kinds) and not against:
                    hidden = any(part.startswith(".") for part in above)
                    ranked.setdefault((kinds.index(True), hidden - agree), []).append(found)
        if not ranked:
            raise MissingImage(self._top / name, self._hint(name, _spelled(stem)) if hint else "")
        best = ranked[min(ranked)]
        if len(best) > 1:
            named = " and ".join(one.where for one in best[:3])
            raise UserError(f"{name!r}: {len(best)} files are meant ({named})")
        return best[0]

    def _hint(self, name: str, key: str) -> str:
        """Return where it is, or the nearest of the names that begin or end alike; comparing with all takes seconds."""
        self._hints += 1
        if self._hints > _HINTS:
            return ""
        for other in self.others:
            with suppress(MissingImage, UserError):
                return f"; it is {other.find(name, hint=False).where}: make data.SPLIT.images a list of both places"
        self._sorted = self._sorted or [(step, sorted(key[::step] for key in self._index)) for step in (1, -1)]
        near = []
        for step, names in self._sorted:
            at = bisect(names, key[::step])
            near += [other[::step] for other in names[max(at - _NEIGHBOURS, 0) : at + _NEIGHBOURS]]
        found = difflib.get_close_matches(key, dict.fromkeys(near), _NEAREST, 0)
        names = ", ".join(repr(self._index[other][0].path) for other in found)
        return f"; the nearest of {self.count:,} files: {names}" if names else "; there are no files"


def _of_folder(top: Path) -> Iterator[_Found]:
    """Yield all that is no folder: what cannot be read is said when it is wanted."""
    seen = set()
    for folder, folders, names in os.walk(top, onerror=_raise, followlinks=True):
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in seen:
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        below = os.path.relpath(folder, top)
        yield from (_Found(top, name if below == "." else f"{below}/{name}") for name in names)


def _of_zip(path: Path, archives: ExitStack) -> Iterator[_Found]:
    check_regular(path, 2**63)
    with open(path, "rb") as file:
        head = file.read(512)
    for (at, magic), kind in _OTHERS.items():
        if head[at:].startswith(magic):
            raise UserError(f"{path}: a {kind} archive")
    archive = archives.enter_context(open_zip(path))
    yield from (_Found(path, "/".join(parts(info.filename)), archive, info) for info in files(archive))


def _raise(error: OSError) -> None:
    raise error


def _spelled(name: str) -> str:
    """Return a name in one spelling: case, and how an accent is written, do not count."""
    return unicodedata.normalize("NFC", name).casefold()
