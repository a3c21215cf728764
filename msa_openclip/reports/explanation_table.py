"""An explanation as HTML: a column for each scale, with where it looked, and a row for each part of its score."""

from __future__ import annotations

import base64
import io
from html import escape

from PIL import Image

from ..explain.explanation import ScaleExplanation
from ..explain.figure import spotlight
from .examples import Reason

THUMBNAIL_PX = 112
STYLE = """
details { margin: .3rem 0 } summary { cursor: pointer; color: #555 }
.parts td:nth-child(2), .parts th:nth-child(2) { text-align: right } .parts td { padding: .05rem .7rem }
.parts tr:last-child td { border-top: 1px solid #888; font-weight: 600 }
"""
_GAIN, _LOSS = "42,127,98", "181,72,47"


def explanation_table(reason: Reason) -> str:
    """A table that opens on a click; in each column the parts add up to the score in the last row."""
    scales = reason.explanation.scales
    texts = [word.text for word in scales[0].words] + ["the sentence", "the image"]
    parts = [[*(word.contribution for word in scale.words), scale.sentence, scale.image] for scale in scales]
    largest = max(abs(part) for column in parts for part in column) or 1.0
    rows = [f"<tr><th>part of the score{''.join(_head(reason, scale) for scale in scales)}"]
    for text, row in zip(texts, zip(*parts, strict=True), strict=True):
        rows.append(f"<tr><td>{escape(text)}{''.join(_cell(part, largest) for part in row)}")
    rows.append(f"<tr><td>score, as a logit{''.join(f'<td>{scale.logit:.3f}' for scale in scales)}")
    name, found = escape(reason.image.image_id), reason.explanation
    summary = f"<summary>Why {name}: cosine {found.cosine:.3f}, fused {found.fused:.2f}</summary>"
    return f"<details>{summary}<table class=parts>{''.join(rows)}</table></details>"


def _head(reason: Reason, scale: ScaleExplanation) -> str:
    name = f"stage {scale.scale.stage}, {scale.scale.pool}"
    looked = spotlight(reason.view, scale.positions).resize((THUMBNAIL_PX, THUMBNAIL_PX))
    return f"<th>{name}<br>{jpeg(looked, f'where {name} looked')}"


def _cell(part: float, largest: float) -> str:
    colour = f"rgba({_GAIN if part > 0 else _LOSS},{0.8 * abs(part) / largest:.2f})"
    return f"<td style='background:{colour}'>{part:+.3f}"


def jpeg(picture: Image.Image, alt: str) -> str:
    """An image element that holds its picture."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    source = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f"<img alt=\"{escape(alt, quote=True)}\" src='{source}'>"
