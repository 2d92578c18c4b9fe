"""Untrusted zip archives: whatever is wrong with one, its error is one that readers expect."""

import io
import random
import zipfile
from collections import Counter

from vlm_vqa.errors import UserError
from vlm_vqa.fetch.sources.official_layout import ImageFiles, MissingImage


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
            images = ImageFiles(path)
        except (zipfile.BadZipFile, OSError):
            refused["archive"] += 1
            continue
        for name in ("a.jpg", "b.jpg", "été.jpg"):
            try:
                images.read(name, 10**6)
            except (UserError, OSError, MissingImage) as error:
                refused[type(error).__name__] += 1
    assert all(refused[kind] > 100 for kind in ("archive", "UserError", "OSError", "MissingImage")), refused
