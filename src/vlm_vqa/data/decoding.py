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

_SIGNATURES = {
    b"\xff\xd8\xff": "a JPEG that is cut short or damaged",
    b"\x89PNG": "a PNG that is cut short or damaged",
    b"GIF8": "a GIF that is cut short or damaged",
    b"RIFF": "a WebP that is cut short or damaged, or a sound or film",
    b"BM": "a BMP that is cut short or damaged",
    b"II*\0": "a TIFF",
    b"MM\0*": "a TIFF",
    b"8BPS": "a Photoshop file",
    b"\0\0\1\0": "an icon (ICO)",
    b"\xff\x0a": "a JPEG XL",
    b"\0\0\0\x0cJXL": "a JPEG XL",
    b"\0\0\0\x0cjP": "a JPEG 2000",
    b"%PDF": "a PDF",
    b"%!PS": "a PostScript file (EPS)",
    b"PK\3\4": "a ZIP archive",
    b"\x1f\x8b": "a gzip archive",
    b"PAR1": "a Parquet file",
    b"version https://git-lfs": "a Git LFS pointer, not the picture (`git lfs pull` gets it)",
}
"""First bytes of files that are met in a picture's place."""


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
    for signature, kind in _SIGNATURES.items():
        if data.startswith(signature):
            return kind
    if data[4:8] == b"ftyp":
        brand = data[8:12]
        if brand.startswith((b"he", b"mif1", b"msf1")):
            return "a HEIC photo, as phones take them"
        return "an AVIF picture" if brand.startswith(b"avi") else "a film (MP4 or QuickTime)"
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
