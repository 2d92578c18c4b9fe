"""Untrusted zip archives: whatever is wrong with one, its error is one that readers expect."""

import io
import lzma
import random
import struct
import zipfile
import zlib
from collections import Counter

import pytest

from vlm_vqa.errors import UserError
from vlm_vqa.fetch.sources.image_files import ImageFiles, MissingImage


def a_zip(method: int) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", method) as archive:
        for name in ("a", "b", "été"):
            archive.writestr(f"{name}.jpg", b"\xff\xd8 as good as a picture" * 20)
    return held.getvalue()


def test_a_damaged_zip_is_named_whatever_zipfile_makes_of_it(tmp_path):
    """4,000 archives, cut off or with changed bytes: in the members, or from the directory on."""
    drawn = random.Random(0)
    whole = [
        a_zip(method) for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    ]
    path, refused = tmp_path / "images.zip", Counter()
    for _ in range(4000):
        data = bytearray(drawn.choice(whole))
        if drawn.random() < 0.2:
            del data[drawn.randrange(len(data)) :]
        else:
            first = drawn.choice([0, data.index(b"PK\1\2")])
            for _ in range(drawn.randint(1, 4)):
                data[drawn.randrange(first, len(data))] = drawn.choice([0, 1, 255, drawn.randrange(256)])
        path.write_bytes(data)
        try:
            images = ImageFiles([path])
        except (zipfile.BadZipFile, OSError):
            refused["archive"] += 1
            continue
        for name in ("a.jpg", "b.jpg", "été.jpg"):
            try:
                images.read(name, 10**6)
            except (UserError, OSError, MissingImage) as error:
                refused[type(error).__name__] += 1
    assert all(refused[kind] > 100 for kind in ("archive", "UserError", "OSError", "MissingImage")), refused


# 6 and 30 are where a member has its flags and name, DIRECTORY + 6, 8 and 10 where the directory has version, flags, method.
DIRECTORY = a_zip(zipfile.ZIP_STORED).index(b"PK\1\2")
REASONS = {
    "a method that Python lacks": (NotImplementedError, zipfile.ZIP_STORED, {DIRECTORY + 10: b"\x61\0"}),
    "patched data": (NotImplementedError, zipfile.ZIP_STORED, {DIRECTORY + 8: b"\x20\0"}),
    "strong encryption": (NotImplementedError, zipfile.ZIP_STORED, {DIRECTORY + 8: b"\x40\0"}),
    "a member's name": (UnicodeDecodeError, zipfile.ZIP_STORED, {6: b"\0\x08", 30: b"\xff"}),
    "the format's version": (NotImplementedError, None, {DIRECTORY + 6: b"\x63\0"}),
    "a name of the directory": (UnicodeDecodeError, None, {DIRECTORY + 8: b"\0\x08", DIRECTORY + 46: b"\xff"}),
    "deflated bytes": (zlib.error, zipfile.ZIP_DEFLATED, {35: b"\xff" * 8}),
    "LZMA's bytes": (lzma.LZMAError, zipfile.ZIP_LZMA, {39: b"\xff" * 8}),
}
"""What each error that is not zipfile's own comes of: the error, the method (None: opening raises it), the bytes changed."""


@pytest.mark.parametrize(("kind", "method", "changes"), REASONS.values(), ids=REASONS)
def test_every_error_that_is_caught_has_an_archive_that_raises_it(tmp_path, kind, method, changes):
    data, path = bytearray(a_zip(method or zipfile.ZIP_STORED)), tmp_path / "images.zip"
    for at, new in changes.items():
        data[at : at + len(new)] = new
    path.write_bytes(data)
    with pytest.raises(kind):
        zipfile.ZipFile(path).read("a.jpg")
    if method is None:
        with pytest.raises(zipfile.BadZipFile, match="its directory cannot be read"):
            ImageFiles([path])
    else:
        with pytest.raises(UserError, match="a.jpg: cannot be unpacked"):
            ImageFiles([path]).read("a.jpg", 10**6)


def test_a_zip64_offset_that_no_file_has_is_named(tmp_path):
    """The one way in which reading a member ends in a ValueError that is no UnicodeDecodeError."""
    data = a_zip(zipfile.ZIP_STORED)
    directory, end = data.index(b"PK\1\2"), data.index(b"PK\5\6")
    entry = bytearray(data[directory : data.index(b"PK\1\2", directory + 4)])
    extra = struct.pack("<HHQ", 1, 8, 2**64 - 1)
    entry[42:46], entry[30:32] = b"\xff" * 4, struct.pack("<H", len(extra))
    last = bytearray(data[end:])
    last[8:16] = struct.pack("<HHL", 1, 1, len(entry) + len(extra))
    path = tmp_path / "images.zip"
    path.write_bytes(data[:directory] + entry + extra + last)
    with pytest.raises(UserError, match="a.jpg: cannot be unpacked"):
        ImageFiles([path]).read("a.jpg", 10**6)
