"""Fills in Jinja2 templates, and turns images into URLs that hold them.

In HTML every value is escaped, so that no caption, class name or path can become markup; the layout also forbids the
browser to run scripts and to load anything.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from PIL import Image

SHARED = Path(__file__).parent
"""Holds the layout, the style sheet and the macros."""


def render(template: str, *folders: Path, **values: Any) -> str:
    """Fill in a template.

    Args:
        template: file name; what ends in `.html` is escaped, other text (Markdown) is not.
        folders: where to look for it, before SHARED.
        values: what the template uses; a missing one is an error.
    """
    environment = Environment(
        loader=FileSystemLoader([*folders, SHARED]),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(values)


def jpeg_url(image: Image.Image, size_px: int) -> str:
    """A `data:` URL of an image, scaled down to at most `size_px` in width and height."""
    small = image.convert("RGB")
    small.thumbnail((size_px, size_px))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return data_url("image/jpeg", buffer.getvalue())


def data_url(kind: str, content: bytes) -> str:
    """A URL that holds its content."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
