"""From an image file's bytes to pixels, or to words that say what the bytes are instead.

Apart from the other formats of this folder, so that a question about one picture loads nothing that reads tables.
"""

import codecs
import warnings
from io import BytesIO

from PIL import Image

from vlm_vqa.errors import UserError

# Decoders that are safe on strangers' bytes; Pillow has others that start programs (EPS).
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# Pillow clips more than 8 bits a channel to white without a word.
_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
# We bound the size ourselves, and below Pillow's own bound.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_CUT = ((b"\xff\xd8\xff", "JPEG"), (b"\x89PNG", "PNG"), (b"GIF8", "GIF"), (b"RIFF", "WebP"), (b"BM", "BMP"))
_OTHERS = {
    b"II*\0": "a TIFF",
    b"MM\0*": "a TIFF",
    b"%PDF": "a PDF",
    b"%!PS": "a PostScript file (EPS)",
    b"PK\3\4": "a ZIP archive",
    b"version https://git-lfs": "a Git LFS pointer (`git lfs pull` gets the picture)",
} | {signature: f"a {name} that is cut short or damaged" for signature, name in _CUT}
"""What files are that are met in a picture's place, by their first bytes."""


def open_image(data: bytes, name: str, max_pixels: int, bound: str = "data.max_image_pixels") -> Image.Image:
    """Decode an image file completely, as RGB with 8 bits a channel.

    Greyscale, palette and CMYK become RGB. An EXIF orientation is not applied: DINOv2's `BitImageProcessor` looks at
    the pixels as stored, and COCO's images are stored upright.

    Args:
        data: the file's bytes (JPEG, PNG, WebP, GIF or BMP; of an animation the first frame).
        name: stands in error messages.
        max_pixels: most pixels, width times height; checked before anything is decoded.
        bound: what the user calls `max_pixels`.

    Raises:
        UserError: not an image of these formats, larger than `max_pixels`, cut short or damaged.
    """
    try:
        with Image.open(BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
            if width * height <= max_pixels:
                if image.mode in _DEEP_MODES:
                    raise UserError(f"{name}: more than 8 bits a channel (mode {image.mode}). Convert it to 8 bits.")
                image.load()
                return image if image.mode == "RGB" else image.convert("RGB")
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"{name}: more pixels than Pillow decodes at all ({error}). Make the image smaller.") from error
    # On damaged bytes Pillow raises OSError, SyntaxError, struct.error and more.
    except Exception as error:
        raise UserError(
            f"{name}: not a readable image: it is {_what_it_is(data)}. Give an intact JPEG, PNG, WebP, GIF or BMP."
        ) from error
    raise UserError(
        f"{name}: {width} x {height} is more than {bound} ({max_pixels}). Make the image smaller, or raise the bound if "
        "you trust the file."
    )


def _what_it_is(data: bytes) -> str:
    """Say what a file is that could not be decoded, from its first bytes."""
    if not data.strip(b"\0"):
        return f"{len(data)} zero bytes" if data else "empty"
    for signature, kind in _OTHERS.items():
        if data.startswith(signature):
            return kind
    if data[4:8] == b"ftyp":
        brands = {b"he": "a HEIC photo, as phones take them", b"mi": "a HEIC photo", b"av": "an AVIF picture"}
        return brands.get(data[8:10], "a film (MP4 or QuickTime)")
    try:
        # Bit by bit, for a character may be cut where the first bytes end.
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(data[:1000]).lower()
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        return "of no kind that is known here"
    if text.lstrip().startswith(("<!doctype html", "<html")):
        return "a web page (HTML)"
    return "an SVG drawing" if "<svg" in text else "a text file"
