"""What the HTML pages of data and evaluation share: templates that escape, one style, and pictures inside the page."""

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vlm_vqa.data.decoding import open_image

_THUMBNAIL = (300, 220)


def environment(folder: Path, **options: Any) -> Environment:
    """Return the templates of a folder, which may extend `page.html.j2`; every text they are given is escaped."""
    folders = FileSystemLoader([folder, Path(__file__).parent])
    return Environment(loader=folders, autoescape=True, undefined=StrictUndefined, trim_blocks=True, **options)


def thumbnail(data: bytes, name: str, max_pixels: int) -> str:
    """Return a picture as a data URL: what the model sees, made small; the arguments are `decoding.open_image`'s."""
    image = open_image(data, name, max_pixels)
    image.thumbnail(_THUMBNAIL)
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
