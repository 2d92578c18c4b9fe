"""Image files: every usual kind becomes RGB, size is bounded before decoding, and what is no image is called what it is."""

import base64
import re
import struct
import subprocess
import sys
import zlib
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers.image_utils import load_image

import vlm_vqa
from vlm_vqa.data.decoding import open_image
from vlm_vqa.errors import UserError

PIXELS = 1_000_000


def encode(image, kind, **options):
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation):
    held = Image.Exif()
    held[0x0112] = orientation
    return held


# No two of its eight orientations are alike.
DRAWING = Image.new("RGB", (60, 40), (200, 30, 40))
DRAWING.paste((20, 60, 210), (0, 20, 60, 40))
DRAWING.paste((0, 0, 0), (0, 0, 16, 10))


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


def png(width, height, bits, colours, rows, early=(), late=()):
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    chunks = ((b"IHDR", header), *early, (b"IDAT", zlib.compress(rows)), *late, (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def huge_png(width, height):
    """A PNG that claims a size and has no pixels: only a check before decoding can name the size."""
    return png(width, height, 8, 2, b"")


def test_size_is_bounded_before_decoding():
    with pytest.raises(UserError, match=r"a.png: 1001 x 1000 is more than data.max_image_pixels \(1000000\)"):
        open_image(huge_png(1001, 1000), "a.png", PIXELS)
    # Above its own bound Pillow refuses even to open.
    with pytest.raises(UserError, match="a.png: more pixels than Pillow decodes"):
        open_image(huge_png(60_000, 60_000), "a.png", PIXELS)


def test_the_bound_itself_is_allowed():
    assert open_image(encode(Image.new("RGB", (1000, 1000)), "PNG"), "a.png", PIXELS).size == (1000, 1000)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_more_than_16_bits_are_refused_instead_of_clipped_to_white(mode):
    with pytest.raises(UserError, match="a.png: more than 8 bits a channel"):
        open_image(encode(Image.new(mode, (4, 4)), "TIFF"), "a.png", PIXELS)


@pytest.mark.parametrize("kind", ["EPS", "PPM", "TGA", "JPEG2000"])
def test_other_formats_are_refused_though_pillow_reads_them(kind):
    with pytest.raises(UserError, match="a.jpg: not a readable image"):
        open_image(encode(Image.new("RGB", (4, 4)), kind), "a.jpg", PIXELS)


@pytest.mark.parametrize(
    "codec", ["raw", "packbits", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "group4", "lzma", "zstd", "tiff_ccitt"]
)
def test_a_tiff_is_read_if_its_codec_is_a_usual_one(codec):
    bits = codec in ("group4", "tiff_ccitt")
    data = encode(DRAWING.convert("1") if bits else DRAWING, "TIFF", compression=codec)
    if codec in ("lzma", "zstd", "tiff_ccitt"):
        with pytest.raises(UserError, match=f"a.tif: a TIFF compressed as {codec}, which is not read"):
            open_image(data, "a.tif", PIXELS)
    else:
        assert open_image(data, "a.tif", PIXELS).size == DRAWING.size


def test_a_cameras_raw_file_is_not_taken_for_its_thumbnail():
    with pytest.raises(UserError, match="a.dng: a camera's raw file"):
        open_image(encode(DRAWING, "TIFF", tiffinfo={254: 1}), "a.dng", PIXELS)


KINDS = ("JPEG", "PNG", "WEBP", "TIFF", "AVIF", "MPO")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", range(10))
def test_pictures_stand_upright_as_everywhere(kind, orientation):
    data = encode(DRAWING, kind, exif=exif(orientation))
    image = open_image(data, "x", PIXELS)
    assert np.array_equal(image, ImageOps.exif_transpose(Image.open(BytesIO(data))).convert("RGB"))
    assert image.info["changes"] == (["turned upright, as its EXIF says"] if 2 <= orientation <= 8 else [])
    assert image.size == ((40, 60) if 5 <= orientation <= 8 else (60, 40))


@pytest.mark.parametrize("place", ["before the pixels", "after them"])
def test_exif_of_a_png_is_found(place):
    chunk = [(b"eXIf", exif(6).tobytes()[6:])]
    data = png(2, 1, 8, 2, b"\0\1\2\3\4\5\6", **{"early" if place.startswith("before") else "late": chunk})
    assert open_image(data, "x", PIXELS).size == (1, 2)


@pytest.mark.parametrize("broken", [b"MM\0*\xff\xff\xff\xff", b"Exif\0\0rubbish", b"", exif(6).tobytes()[6:-7]])
def test_broken_exif_neither_stops_nor_warns(broken, tmp_path):
    (tmp_path / "a").write_bytes(encode(DRAWING, "JPEG", exif=b"Exif\0\0" + broken))
    (tmp_path / "b").write_bytes(png(2, 1, 8, 2, bytes(7), early=[(b"eXIf", broken)]))
    # In a process of its own, for pytest has its own filters of warnings.
    code = "from vlm_vqa.data.decoding import open_image; [open_image(open(n, 'rb').read(), n, 9999) for n in 'ab']"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr == ""


SEE_THROUGH = DRAWING.copy()
SEE_THROUGH.putalpha(Image.fromarray(np.repeat(np.where(np.arange(60) < 30, 0, 255)[None], 40, 0).astype(np.uint8)))
FEW = DRAWING.quantize(4)


@pytest.mark.parametrize(
    "data",
    [
        *(encode(SEE_THROUGH, kind, lossless=True) for kind in ("PNG", "WEBP", "TIFF", "AVIF", "GIF")),
        *(encode(SEE_THROUGH.convert("LA"), kind) for kind in ("PNG", "TIFF")),
        encode(FEW, "PNG", transparency=FEW.getpixel((0, 0))),
        encode(FEW, "GIF", transparency=FEW.getpixel((0, 0))),
        encode(FEW, "PNG", transparency=bytes(0 if at == FEW.getpixel((0, 0)) else 255 for at in range(4))),
        encode(DRAWING, "PNG", transparency=(0, 0, 0)),
        encode(DRAWING.convert("L"), "PNG", transparency=0),
        encode(DRAWING.convert("1"), "PNG", transparency=0),
    ],
)
def test_what_is_transparent_lies_over_white(data):
    image = open_image(data, "x", PIXELS)
    assert image.info["changes"] == ["transparent, laid over white"]
    assert np.asarray(image)[:10, :10].min() >= 254


def test_half_transparent_is_half_white_and_opaque_alpha_is_no_change():
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert open_image(encode(half, "PNG"), "x", PIXELS).getpixel((0, 0)) == (127, 127, 127)
    image = open_image(encode(DRAWING.convert("RGBA"), "PNG"), "x", PIXELS)
    assert image.info["changes"] == [] and np.array_equal(image, DRAWING)


GREYS = np.linspace(0, 65535, 2400).reshape(40, 60)


@pytest.mark.parametrize(
    ("order", "mode", "kind"), [("<u2", "I;16", "PNG"), ("<u2", "I;16", "TIFF"), (">u2", "I;16B", "TIFF")]
)
def test_16_bits_of_grey_become_8(order, mode, kind):
    grey = Image.frombytes(mode, (60, 40), GREYS.astype(order).tobytes())
    image = open_image(encode(grey, kind), "x", PIXELS)
    assert image.info["changes"] == ["16 bits of grey to 8"]
    assert np.abs(np.asarray(image)[..., 0] - GREYS / 257).max() <= 1


def test_16_bits_of_grey_turn_and_lie_over_white_too():
    grey = Image.fromarray(GREYS.astype(np.uint16))
    image = open_image(encode(grey, "PNG", exif=exif(3), transparency=0), "x", PIXELS)
    assert len(image.info["changes"]) == 3 and image.getpixel((59, 39)) == (255,) * 3 == image.getpixel((0, 0))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_has_its_colours(kind):
    data = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), kind)
    for variant in (data, data.replace(b"Adobe\0d", b"Bdobe\0d")):
        image = open_image(variant, "x", PIXELS)
        assert image.info["changes"] == ["CMYK to RGB"]
    assert np.abs(np.asarray(open_image(data, "x", PIXELS), int) - (255, 0, 0)).max() < 6


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_of_several_frames_the_first_is_seen(kind):
    data = encode(DRAWING, kind, save_all=True, append_images=[Image.new("RGB", (60, 40), "green")], lossless=True)
    image = open_image(data, "x", PIXELS)
    assert image.info["changes"] == ["the first of several frames"]
    assert np.abs(np.asarray(image, int) - np.asarray(DRAWING)).mean() < 4


BOMB = zlib.compress(bytes(5 * 10**7))


@pytest.mark.parametrize("where", ["early", "late"])
@pytest.mark.parametrize(
    "chunks",
    [
        [(b"iCCP", b"x\0\0" + BOMB)],
        [(b"zTXt", b"x\0\0" + BOMB)],
        [(b"iTXt", b"x\0\1\0\0\0" + BOMB)],
        [(b"zTXt", b"x\0\0" + zlib.compress(bytes(900_000)))] * 100,
    ],
    ids=["profile", "text", "international text", "many texts"],
)
def test_no_text_or_profile_of_a_png_costs_its_pixels(chunks, where):
    assert open_image(png(2, 1, 8, 2, b"\0\1\2\3\4\5\6", **{where: chunks}), "x", PIXELS).getpixel((1, 0)) == (4, 5, 6)


@pytest.mark.parametrize("kind", [*KINDS, "GIF", "BMP"])
@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1", "CMYK", "turned"])
def test_others_see_the_same(kind, mode):
    """All that reads a picture without us: transformers and datasets."""
    picture = DRAWING if mode == "turned" else DRAWING.convert(mode)
    options = {"exif": exif(8)} if mode == "turned" and kind in KINDS else {}
    try:
        data = encode(picture, kind, **options)
    except (OSError, ValueError):
        pytest.skip(f"there is no {kind} of mode {mode}")
    seen = open_image(data, "x", PIXELS)
    loaded = load_image(base64.b64encode(data).decode())
    decoded = datasets.Image().decode_example({"bytes": data, "path": None})
    assert np.array_equal(seen, loaded) and np.array_equal(seen, decoded.convert("RGB"))


def by_the_card(data):
    """Return what the exported card's own lines make of a picture.

    It is given as bytes: where Pillow 13 has the path of an uncompressed TIFF it maps it into memory, turned ones wrongly.
    """
    card = (Path(vlm_vqa.__file__).parent / "inference" / "card.md").read_text()
    names = {"Image": Image, "ImageOps": ImageOps, "path": BytesIO(data)}
    exec("\n".join(line for line in card.splitlines() if line.startswith(("picture = ", "image = "))), names)
    return names["image"]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("kind", [*KINDS, "GIF", "BMP"])
def test_the_card_sees_the_same(kind, mode, orientation):
    picture = SEE_THROUGH.convert(mode) if mode.endswith("A") else DRAWING.convert(mode)
    try:
        data = encode(picture, kind, **({"exif": exif(orientation)} if kind in KINDS else {}))
    except (OSError, ValueError):
        pytest.skip(f"there is no {kind} of mode {mode}")
    assert np.array_equal(open_image(data, "x", PIXELS), by_the_card(data))


def test_nothing_else_opens_pictures():
    """Records, features, `ask`, HELM's client and both reports see through one function."""
    package = Path(vlm_vqa.__file__).parent
    found = {path.name for path in package.rglob("*.py") if re.search(r"Image\.open\(|load_image", path.read_text())}
    # Which writes easy-VQA's own drawings out.
    assert found == {"decoding.py", "easy_vqa.py"}


def test_others_see_what_lies_under_the_transparency():
    """Where we differ, as `open_image` says: until they change."""
    data = encode(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), "PNG")
    assert np.asarray(open_image(data, "x", PIXELS)).min() == 255
    assert np.asarray(load_image(base64.b64encode(data).decode())).max() == 0


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
        (b"\0\0\0\x18ftypavif\0\0\0\0", "it is an AVIF that is cut short"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "it is a film"),
        (b"%PDF-1.7\n", "it is a PDF"),
        (b"PK\3\4", "it is a ZIP archive"),
        (encode(Image.new("RGB", (4, 4)), "TIFF")[:50], "it is a TIFF that is cut short"),
        (encode(Image.new("RGB", (40, 40)), "AVIF")[:-20], "it is an AVIF that is cut short"),
        (encode(Image.new("RGB", (40, 40)), "JPEG2000"), "it is a JPEG 2000"),
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
