"""Pictures that both splits have: by their bytes, and by their looks; near means near."""

import io
import random
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from vlm_vqa.data.decoding import open_image
from vlm_vqa.errors import UserError
from vlm_vqa.fetch.statistics import Look, Lookalikes, look
from vlm_vqa.fetch.write_records import fetch
from vlm_vqa.params import Doubtful


def compared(train, val):
    """Return which of two lists of pictures look alike, by place."""
    alike = Lookalikes([range(len(train)), range(1000, 1000 + len(val))])
    for split, first in ((train, 0), (val, 1000)):
        for place, picture in enumerate(split):
            alike.add(first + place, f"{first + place}", look(picture))
    return [(first, second - 1000) for first, second in alike.near()]


def again(picture, kind, size=1.0, **options):
    buffer = io.BytesIO()
    small = picture.resize([max(1, round(edge * size)) for edge in picture.size], Image.Resampling.BICUBIC)
    small.save(buffer, kind, **options)
    return open_image(buffer.getvalue(), "x", 10**8)


@pytest.fixture(scope="module")
def photos(shared_data):
    files = sorted((shared_data / "vqav2-sample" / "images").iterdir())
    return [open_image(file.read_bytes(), file.name, 10**8) for file in files]


@pytest.mark.parametrize(
    "copy",
    [
        lambda photo: again(photo, "JPEG", quality=30),
        lambda photo: again(photo, "JPEG", 0.5, quality=85),
        lambda photo: again(photo, "PNG", 0.33),
        lambda photo: again(photo, "WEBP", 0.5, quality=60),
    ],
    ids=["encoded again", "half", "a third", "WebP"],
)
def test_a_photo_is_known_again(copy, photos):
    found = compared(photos, [copy(photo) for photo in photos])
    assert all(first == second for first, second in found) and len(found) >= 0.97 * len(photos)


def test_different_photos_are_not_alike(photos):
    assert compared(photos[::2], photos[1::2]) == []


def test_drawings_that_differ_in_colour_are_not_alike():
    def drawing(colour, at):
        picture = Image.new("RGB", (64, 64), "white")
        picture.paste(colour, (at, 20, at + 20, 40))
        return picture

    assert compared([drawing("red", 10)], [drawing("blue", 10), drawing("red", 30)]) == []
    assert compared([drawing("red", 10)], [drawing("red", 10)]) == [(0, 0)]


def test_pictures_of_both_splits_and_of_equal_bytes_are_no_look_alikes():
    seen = Look(bytes(8), bytes(192))
    alike = Lookalikes([{1, 2, 3}, {3, 4, 5, 6}])
    for image_id, sha256 in ((1, "a"), (2, "a"), (3, "b"), (4, "a"), (5, "c"), (6, "c")):
        alike.add(image_id, sha256, seen)
    assert alike.equal() == [(1, 4)] and alike.twins == [1, 1] and alike.near() == [(1, 5), (1, 6)]


def test_many_that_look_the_same_are_compared_once():
    alike = Lookalikes([range(20_000), range(20_000, 40_000)])
    for image_id in range(40_000):
        alike.add(image_id, str(image_id), Look(bytes(8), bytes([image_id % 7] * 192)))
    start = time.perf_counter()
    assert len(alike.near()) == 20_000 and time.perf_counter() - start < 5


def test_as_many_as_vqav2_has_take_seconds():
    drawn, alike = random.Random(0), Lookalikes([range(40_000), range(40_000, 60_000)])
    for image_id in range(60_000):
        alike.add(image_id, str(image_id), Look(drawn.randbytes(8), drawn.randbytes(192)))
    start = time.perf_counter()
    assert alike.near() == [] and time.perf_counter() - start < 10


def test_a_picture_in_both_splits_is_refused_unless_that_is_allowed(vqav2_folder, directory_params, tmp_path):
    folder = vqav2_folder()
    one, other = (sorted((folder / f"{split}2014").iterdir())[0] for split in ("train", "val"))
    shutil.copy(one, other)
    with pytest.raises(
        UserError, match=rf"image in both splits under two ids: 1\.(.|\n)*{one.name} .*{other.name} .*byte for byte"
    ):
        fetch(directory_params(folder), tmp_path / "records")
    manifest = fetch(directory_params(folder, allow_split_overlap=True), tmp_path / "records")
    assert manifest["pictures"]["twins_across"] == 1


def test_look_alikes_are_counted_or_refused(vqav2_folder, directory_params, tmp_path, monkeypatch, caplog):
    folder = vqav2_folder()
    for split in ("train", "val"):
        for number, path in enumerate(sorted((folder / f"{split}2014").iterdir())):
            noise = np.random.default_rng([number, split == "val"]).integers(0, 256, (3, 4, 3), np.uint8)
            Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(path, quality=95)
    one, other = (sorted((folder / f"{split}2014").iterdir())[0] for split in ("train", "val"))
    with Image.open(one) as picture:
        picture.resize((320, 240)).save(other, quality=80)
    assert fetch(directory_params(folder), tmp_path / "records")["pictures"]["alike_across"] == 1
    assert "1 pictures of val look like one of train" in caplog.text and other.name in caplog.text
    params = directory_params(folder, doubtful=Doubtful.REFUSE)
    with pytest.raises(UserError, match=rf"look-alikes in both splits: 1\.(.|\n)*{one.name} .*{other.name}"):
        fetch(params, tmp_path / "records")


def test_what_is_missing_is_not_compared(vqav2_folder, directory_params, tmp_path):
    """An image that stands in both splits and lacks one of its files is a violation, and no pair is looked for."""
    folder = vqav2_folder()
    params = directory_params(folder, allow_split_overlap=True)
    params = replace(params, val=replace(params.train, images="val2014"))
    with pytest.raises(UserError, match="missing image: 4"):
        fetch(params, tmp_path / "records")
