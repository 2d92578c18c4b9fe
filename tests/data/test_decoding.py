"""Image files: every usual kind becomes RGB, size is bounded before decoding, and what is no image is called what it is."""

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from vlm_vqa.data.decoding import open_image
from vlm_vqa.errors import UserError

PIXELS = 1_000_000


def encode(image, kind):
    buffer = BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("RGB", "JPEG"),
        ("P", "PNG"),
        ("P", "GIF"),
        ("1", "PNG"),
        ("LA", "PNG"),
        ("RGBA", "PNG"),
        ("RGB", "WEBP"),
        ("L", "BMP"),
    ],
)
@pytest.mark.parametrize("size", [(1, 1), (7, 501), (640, 3)])
def test_every_usual_kind_of_image_becomes_rgb(mode, kind, size):
    opened = open_image(encode(Image.new("RGB", size, (255, 255, 255)).convert(mode), kind), "x", PIXELS)
    assert opened.mode == "RGB" and opened.size == size
    assert np.asarray(opened).min() >= 245


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9])
def test_an_image_cut_short_is_refused(kind, share):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    data = encode(noise, kind)
    with pytest.raises(UserError, match="folder/a.jpg: not a readable image: it is .*intact JPEG"):
        open_image(data[: int(len(data) * share)], "folder/a.jpg", PIXELS)


def huge_png(width, height):
    """A PNG that claims a size and has no pixels: only a check before decoding can name the size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", b""), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def test_size_is_bounded_before_decoding():
    with pytest.raises(UserError, match=r"a.png: 1001 x 1000 is more than data.max_image_pixels \(1000000\)"):
        open_image(huge_png(1001, 1000), "a.png", PIXELS)
    # Above its own bound Pillow refuses even to open.
    with pytest.raises(UserError, match="a.png: more pixels than Pillow decodes"):
        open_image(huge_png(60_000, 60_000), "a.png", PIXELS)


def test_the_bound_itself_is_allowed():
    assert open_image(encode(Image.new("RGB", (1000, 1000)), "PNG"), "a.png", PIXELS).size == (1000, 1000)


def test_deep_images_are_refused_instead_of_clipped_to_white():
    deep = Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16))
    with pytest.raises(UserError, match="a.png: more than 8 bits a channel"):
        open_image(encode(deep, "PNG"), "a.png", PIXELS)


@pytest.mark.parametrize("kind", ["EPS", "TIFF", "PPM"])
def test_other_formats_are_refused_though_pillow_reads_them(kind):
    with pytest.raises(UserError, match="a.jpg: not a readable image"):
        open_image(encode(Image.new("RGB", (4, 4)), kind), "a.jpg", PIXELS)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it is empty"),
        (b"\0" * 30, "it is 30 zero bytes"),
        (b"just some words\n", "it is a text file"),
        ("Gr\u00fc\u00dfe ".encode() * 200, "it is a text file"),
        (b"\n<!DOCTYPE html><html>", "it is a web page"),
        (b"<?xml version='1.0'?><svg>", "it is an SVG drawing"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a Git LFS pointer.*git lfs pull"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "it is a HEIC photo"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0", "it is a HEIC photo"),
        (b"\0\0\0\x18ftypavif\0\0\0\0", "it is an AVIF picture"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "it is a film"),
        (b"%PDF-1.7\n", "it is a PDF"),
        (b"PK\3\4", "it is a ZIP archive"),
        (encode(Image.new("RGB", (4, 4)), "TIFF"), "it is a TIFF"),
        (encode(Image.new("RGB", (40, 40)), "JPEG")[:200], "it is a JPEG that is cut short or damaged"),
        (encode(Image.new("RGB", (40, 40)), "PNG")[:60], "it is a PNG that is cut short or damaged"),
        (b"\xfe\xed\xfa\xcf\0\1", "it is of no kind that is known here"),
    ],
)
def test_what_is_no_image_is_called_what_it_is(data, words):
    with pytest.raises(UserError, match=f"folder/a.jpg: not a readable image: {words}") as caught:
        open_image(data, "folder/a.jpg", PIXELS)
    assert "BytesIO" not in str(caught.value)


def test_the_bound_has_the_name_that_the_user_knows():
    with pytest.raises(UserError, match=r"more than --max-image-pixels \(1000000\)"):
        open_image(huge_png(1001, 1000), "a.png", PIXELS, bound="--max-image-pixels")
