"""From an image file's bytes to pixels, or to words that say what the bytes are instead.

Apart from the other formats of this folder, so that a question about one picture loads nothing that reads tables.
"""

import warnings
from contextlib import suppress
from io import BytesIO

import numpy as np
from PIL import ExifTags, Image

from vlm_vqa.errors import UserError

# Decoders that are fit for strangers' bytes: small, or fuzzed and kept as browsers' are. Pillow has others that start
# programs (EPS) or that hardly anyone keeps.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "TIFF")
_WANTED = "Give an intact JPEG, PNG, WebP, GIF, BMP, AVIF or TIFF, or convert it into one."
# libtiff's faults were mostly in its rare codecs: of old JPEG, SGI's logarithms, ThunderScan, and of what wraps libraries.
_TIFF_CODECS = ("raw", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "jpeg", "group3", "group4")
_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # chunks of a PNG that may be too much for Pillow, without pixels
_TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # `Image.Transpose` that brings each EXIF orientation upright
# Pillow warns of metadata and sizes without a file's name; we bound the size ourselves, and below Pillow's own bound.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_DAMAGED = "that is cut short or damaged"
_CUT = ((b"\xff\xd8\xff", "JPEG"), (b"\x89PNG", "PNG"), (b"GIF8", "GIF"), (b"RIFF", "WebP"), (b"BM", "BMP"))
_OTHERS = {
    b"II*\0": f"a TIFF {_DAMAGED}, or of a kind that is not read",
    b"MM\0*": f"a TIFF {_DAMAGED}, or of a kind that is not read",
    b"\0\0\0\x0cjP  ": "a JPEG 2000",
    b"\0\0\0\x0cJXL ": "a JPEG XL",
    b"\xff\x0a": "a JPEG XL",
    b"%PDF": "a PDF",
    b"%!PS": "a PostScript file (EPS)",
    b"PK\3\4": "a ZIP archive",
    b"version https://git-lfs": "a Git LFS pointer (`git lfs pull` gets the picture)",
} | {signature: f"a {name} {_DAMAGED}" for signature, name in _CUT}
"""What files are that are met in a picture's place, by their first bytes."""


def open_image(data: bytes, name: str, max_pixels: int, bound: str = "data.max_image_pixels") -> Image.Image:
    """Decode an image file completely, as people see it: RGB with 8 bits a channel, upright, opaque. `info["changes"]` says
    in words what was changed beside decoding. UserError if `data` are no image of `_FORMATS`, cut short, damaged, or larger
    than `max_pixels` (width times height, which the user calls `bound`), before anything is decoded; `name` stands in its
    message.

    The EXIF orientation is applied, what is transparent lies over white, 16 bits of grey become 8; greyscale, palette and
    CMYK become RGB; of several frames or pages the first is taken; colour profiles are not applied.
    `transformers.image_utils.load_image` and `datasets` see the same, but that they show what lies under the transparency,
    often black, and clip 16 bits.
    """
    try:
        with Image.open(BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
            if width * height <= max_pixels:
                return _as_seen(image, name)
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"{name}: more pixels than Pillow decodes at all ({error}). Make the image smaller.") from error
    # On damaged bytes Pillow raises OSError, SyntaxError, struct.error and more.
    except Exception as error:
        if "MAX_TEXT" in str(error) and (smaller := _without_texts(data)) != data:
            return open_image(smaller, name, max_pixels, bound)
        raise UserError(f"{name}: not a readable image: it is {_what_it_is(data)}. {_WANTED}") from error
    mend = "Make the image smaller, or raise the bound if you trust the file."
    raise UserError(f"{name}: {width} x {height} is more than {bound} ({max_pixels}). {mend}")


def _as_seen(image: Image.Image, name: str) -> Image.Image:
    if image.format == "TIFF":
        if (codec := image.info.get("compression")) not in _TIFF_CODECS:
            raise UserError(f"{name}: a TIFF compressed as {codec}, which is not read. Save it as PNG.")
        # NewSubfileType: the first picture is a small copy of another.
        if image.tag_v2.get(254, 0) & 1:  # ty: ignore[missing-attribute] - TIFFs have it
            raise UserError(f"{name}: a camera's raw file, or one that begins with a small copy. Save it as PNG.")
    several, turn = False, None
    # A GIF's second frame is looked for here, and a PNG's EXIF behind the pixels: a damaged one costs no picture.
    with suppress(Exception):
        several = image.format != "MPO" and image.is_animated  # ty: ignore[missing-attribute]
    if image.format != "TIFF":
        image.load()
    with suppress(Exception):
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    image.load()
    changes = {
        "the first of several frames": several,
        "turned upright, as its EXIF says": turn is not None,
        "CMYK to RGB": image.mode == "CMYK",
        "16 bits of grey to 8": image.mode.startswith("I;16"),
    }
    if image.mode in ("I", "F"):
        raise UserError(f"{name}: more than 8 bits a channel (mode {image.mode}). Convert it to 8 bits.")
    seen = image
    if image.mode.startswith("I;16"):
        # Scaled: Pillow would clip 16 bits of grey to white, and forget which grey stands for transparent.
        values = np.asarray(image)
        seen = Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
        if (hidden := image.info.get("transparency")) is not None:
            seen.putalpha(Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
    # Pillow turns TIFFs itself.
    if turn is not None and image.format != "TIFF":
        seen = seen.transpose(Image.Transpose(turn))
    if seen.has_transparency_data:
        seen = seen.convert("RGBA")
        changes["transparent, laid over white"] = seen.getchannel("A").getextrema() != (255, 255)
        seen = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
    rgb = seen if seen.mode == "RGB" else seen.convert("RGB")
    rgb.info["changes"] = [change for change, made in changes.items() if made]
    return rgb


def _without_texts(png: bytes) -> bytes:
    kept, at = [png[:8]], 8
    while at < len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4], "big")
        kept.append(b"" if png[at + 4 : at + 8] in _TEXTS else png[at:end])
        at = end
    return b"".join(kept)


def _what_it_is(data: bytes) -> str:
    """Say what a file is that could not be decoded, from its first bytes."""
    if not data.strip(b"\0"):
        return f"{len(data)} zero bytes" if data else "empty"
    for signature, kind in _OTHERS.items():
        if data.startswith(signature):
            return kind
    if data[4:8] == b"ftyp":
        brands = {b"he": "a HEIC photo, as phones take them", b"mi": "a HEIC photo", b"av": f"an AVIF {_DAMAGED}"}
        return brands.get(data[8:10], "a film (MP4 or QuickTime)")
    # A character may be cut where the first bytes end.
    text = data[:1000].decode("utf-8-sig", "replace").rstrip("\ufffd").lower()
    if not text or "\0" in text or "\ufffd" in text:
        return "of no kind that is known here"
    if text.lstrip().startswith(("<!doctype html", "<html")):
        return "a web page (HTML)"
    return "an SVG drawing" if "<svg" in text else "a text file"
