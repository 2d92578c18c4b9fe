"""Untrusted zip archives: opened only when every entry is a file of its own below the archive's folder."""

import re
import stat
import sys
import zipfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

from vlm_vqa.fetch.recognise import shown
from vlm_vqa.files import check_regular

# What macOS adds to archives.
_JUNK = re.compile(r"(.*/)?(__MACOSX/.*|\.DS_Store)")


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open an archive. OSError if it cannot be read; BadZipFile if it is damaged, or an entry, which it names, would
    leave its folder, is a link, stands there twice, or shares its bytes with others, as in archives that overflow a disk."""
    check_regular(path, sys.maxsize)
    try:
        archive = zipfile.ZipFile(path)
    # From a damaged directory zipfile raises two errors that are not its own: NotImplementedError for a version of the
    # format above 6.3, UnicodeDecodeError for a name that is not the UTF-8 that its flag says.
    except (NotImplementedError, UnicodeDecodeError) as error:
        raise zipfile.BadZipFile(f"its directory cannot be read: {error}") from error
    entries = archive.infolist()
    names = Counter("/".join(parts(info.filename)) for info in entries)
    kinds = {info.filename: stat.S_IFMT(info.external_attr >> 16) for info in entries}
    by_place = sorted(entries, key=lambda info: info.header_offset)
    faults = {
        # Absolute, with a drive, climbing, or with a byte that ends names.
        "would leave the archive's folder": [
            name
            for name in (info.orig_filename for info in entries)
            if ".." in parts(name) or "\0" in name or re.match(r"[/\\]|[A-Za-z]:", name)
        ],
        # By the Unix mode, where the archive has one.
        "are links or devices": [name for name, kind in kinds.items() if kind not in (0, stat.S_IFREG, stat.S_IFDIR)],
        "stand there more than once": [name for name, count in names.items() if count > 1],
        # They begin before the one before them has ended, whose own header has as many bytes.
        "share their bytes with others": [
            info.filename
            for before, info in pairwise(by_place)
            if info.header_offset < before.header_offset + 30 + before.compress_size
        ],
    }
    for fault, found in faults.items():
        if found:
            raise zipfile.BadZipFile(f"entries that {fault}: {shown(map(repr, found))}")
    return archive


def files(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """Return the entries that are files, without what macOS adds."""
    infos = [info for info in archive.infolist() if not info.filename.endswith(("/", "\\"))]
    return [info for info in infos if not _JUNK.fullmatch("/".join(parts(info.filename)))]


def parts(name: str) -> list[str]:
    """Return a name's folders and its last part. Windows writes backslashes; every unpacker reads them as folders."""
    return [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
