"""Pictures by name: what people mean by a name is found, alike in folders and archives; what is not clear is refused."""

import os
import time
import unicodedata
import zipfile

import pytest

from vlm_vqa.errors import UserError
from vlm_vqa.fetch.sources.image_files import ImageFiles, MissingImage


@pytest.fixture(params=["folder", "zip", "windows zip"])
def places(request, tmp_path):
    """Return a function that lays out files, as text their own path, and opens them."""

    def lay(*names, place="images"):
        if request.param == "folder":
            for name in names:
                (tmp_path / place / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / place / name).write_text(name)
            return tmp_path / place
        with zipfile.ZipFile(tmp_path / f"{place}.zip", "w") as archive:
            for name in names:
                archive.writestr(name if request.param == "zip" else name.replace("/", "\\"), name)
        return tmp_path / f"{place}.zip"

    return lay


@pytest.mark.parametrize(
    ("there", "asked", "found"),
    [
        (["a.jpg", "x/a.jpg", "A.jpg", "a.png"], "a.jpg", "a.jpg"),
        (["x/y/a.jpg", "x/y/b.jpg"], "a.jpg", "x/y/a.jpg"),
        (["a.JPG"], "a.jpg", "a.JPG"),
        (["x/a.jpeg"], "a.jpg", "x/a.jpeg"),
        (["x/a.PNG"], "a", "x/a.PNG"),
        (["a.v2.png", "a.v1.png"], "a.v2", "a.v2.png"),
        (["a.v2.png", "a.v1.png"], "a.v1.jpg", "a.v1.png"),
        (["a.v2.png", "a.png"], "a.v2", "a.v2.png"),
        (["a.img", "a.png"], "a.img", "a.img"),
        (["a.jpg.jpg"], "a.jpg", "a.jpg.jpg"),
        (["a.png", "a.txt", "a.json"], "a.jpg", "a.png"),
        (["my photo (1).jpeg"], " my photo (1).JPG ", "my photo (1).jpeg"),
        (["x/a.jpg"], "./x\\a.jpg", "x/a.jpg"),
        (["x/a.jpg", "y/a.jpg"], "y/a.png", "y/a.jpg"),
        (["x/a.jpg"], "images/x/a.jpg", "x/a.jpg"),
        (["deep/x/a.jpg", "deep/y/a.jpg"], "y/a.jpg", "deep/y/a.jpg"),
        (["x/a.jpg"], "C:\\Users\\me\\a.jpg", "x/a.jpg"),
        (["x/a.jpg"], "../../a.jpg", "x/a.jpg"),
        (["x/a.jpg", "x/.thumbnails/a.jpg", "__MACOSX/x/._a.jpg"], "a.jpg", "x/a.jpg"),
        (["STRASSE.jpg"], "stra\u00dfe.jpg", "STRASSE.jpg"),
    ],
)
def test_a_name_finds_what_is_meant(there, asked, found, places):
    files = ImageFiles([places(*there)])
    assert files.read(asked, 1000).decode() == found
    assert files.find(asked).path == found


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_an_accent_is_one_however_it_is_written(forms, places):
    there, asked = (unicodedata.normalize(form, "\u00e9t\u00e9.jpg") for form in forms)
    assert ImageFiles([places(there)]).read(asked, 1000).decode() == there


@pytest.mark.parametrize(
    ("there", "asked"),
    [
        (["x/a.jpg", "y/a.jpg"], "a.jpg"),
        (["a.png", "a.jpeg"], "a.jpg"),
        (["a.PNG", "A.png"], "a.png"),
        (["x/a.jpg", "y/a.jpg"], "z/a.jpg"),
    ],
)
def test_two_that_may_be_meant_are_both_named(there, asked, places):
    with pytest.raises(UserError, match="2 files are meant") as caught:
        ImageFiles([places(*there)]).read(asked, 1000)
    assert all(name.rpartition("/")[2] in str(caught.value) for name in there)


def test_a_folder_that_is_there_is_meant(places):
    """`dog/1.jpg` is missing, and the cat of that number is no dog."""
    files = ImageFiles([places("cat/1.jpg", "dog/2.jpg")])
    with pytest.raises(MissingImage) as caught:
        files.read("dog/1.jpg", 1000)
    assert "'cat/1.jpg'" in caught.value.args[1]


def test_what_is_no_ending_of_a_picture_is_a_part_of_the_name(places):
    with pytest.raises(MissingImage):
        ImageFiles([places("IMG.png")]).read("IMG.2024", 1000)


def test_several_places_are_one(places, tmp_path):
    files = ImageFiles([places("a.jpg", "b.jpg"), places("x/c.png", "b.jpg", place="more")])
    assert files.read("a.jpg", 1000) == b"a.jpg" and files.read("c.jpg", 1000) == b"x/c.png" and files.count == 4
    with pytest.raises(UserError, match="'b.jpg': 2 files are meant .*images.*more"):
        files.read("b.jpg", 1000)


def test_a_missing_one_names_what_is_near(places):
    files = ImageFiles([places("000000000005.jpg", "unrelated.jpg")])
    with pytest.raises(MissingImage) as caught:
        files.read("COCO_val2014_000000000005.jpg", 1000)
    assert "COCO_val2014_000000000005.jpg" in str(caught.value)
    assert caught.value.args[1].startswith("; the nearest of 2 files: '000000000005.jpg'")


@pytest.mark.parametrize(
    "url", ["https://example.org/a.jpg", "HTTP://example.org/a.jpg", "s3://b/a.jpg", "data:image/png"]
)
def test_a_url_is_called_one(url, places):
    with pytest.raises(UserError, match="a URL, not a file"):
        ImageFiles([places("a.jpg")]).read(url, 1000)


@pytest.mark.parametrize("name", ["..\\a.jpg", "x\\..\\..\\a.jpg", "\\a.jpg", "C:\\a.jpg", "\\\\server\\a.jpg"])
def test_a_windows_name_does_not_leave_the_archive(name, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(name, "x")
    with pytest.raises(zipfile.BadZipFile, match="would leave"):
        ImageFiles([tmp_path / "a.zip"])


def test_the_same_name_with_both_slashes_stands_there_twice(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x/a.jpg", "x")
        archive.writestr("x\\a.jpg", "y")
    with pytest.raises(zipfile.BadZipFile, match="more than once"):
        ImageFiles([tmp_path / "a.zip"])


@pytest.mark.parametrize(
    ("data", "kind"), [(b"\0" * 257 + b"ustar\0", "tar"), (b"\x1f\x8b\x08", "gzip"), (b"Rar!", "rar")]
)
def test_another_archive_is_named(data, kind, tmp_path):
    (tmp_path / "images.tar").write_bytes(data + bytes(1000))
    with pytest.raises(UserError, match=f"images.tar: a {kind} archive"):
        ImageFiles([tmp_path / "images.tar"])


def test_links_are_followed_and_loops_end(tmp_path):
    (tmp_path / "images/x").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.jpg").write_text("a")
    (tmp_path / "images/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images/x/up").symlink_to(tmp_path / "images")
    (tmp_path / "images/loop").symlink_to("loop")
    os.mkfifo(tmp_path / "images/b.jpg")
    files = ImageFiles([tmp_path / "images"])
    assert files.read("a.jpg", 1000) == b"a" and files.count == 3
    with pytest.raises(OSError, match="a pipe, socket or device"):
        files.read("b.jpg", 1000)


def test_hints_are_quick_among_many_files(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number in range(30_000):
            archive.writestr(f"{number:012d}.jpg", b"")
    files, start = ImageFiles([tmp_path / "a.zip"]), time.perf_counter()
    for number in range(1000):
        with pytest.raises(MissingImage):
            files.read(f"COCO_{number:012d}.gif", 10)
    assert time.perf_counter() - start < 10
