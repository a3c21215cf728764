"""What the page of the demo asks for, as plain data: what an index holds, answers, tiles, reasons."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Mapping
from typing import Any

import pyarrow.compute as pc
from PIL import Image

from ..data.captioned import CaptionedImage
from ..data.pixels import load_dates, load_image
from ..explain.explanation import explain
from ..explain.figure import spotlight, view
from ..search import places
from ..search.filters import SearchError, SearchFilter
from ..search.schema import bounds
from ..search.searcher import Hit, Searcher
from ..shards.imagery import prepare as shard_images
from ..shards.output import printable

SHOWN, _MOST = 24, 384
"""Answers of a search unless the page asks for more, and at most."""
_TILE_PX = 512
_DRAWN = 2000  # outlines that show where the index has tiles
_LISTED = 200  # classes that are offered


class Answers:
    """Asks one index; several threads may call it.

    Args:
        searcher: over the index.
    """

    def __init__(self, searcher: Searcher) -> None:
        self._searcher, self._tiles, self._model = searcher, searcher.index.images, searcher.index.model
        self._lock = threading.Lock()  # neither files of metadata nor models are made for several threads at once

    def about(self) -> dict[str, Any]:
        """The index as a whole: `boxes` (west, south, east, north) say where some of its tiles lie."""
        with self._lock:
            about = {"images": len(self._tiles), "columns": self._tiles.schema.names, "shown": SHOWN}
            if not len(self._tiles):
                return about | {"classes": [], "boxes": []}
            table = self._tiles.columns(["class", "bbox"])
        box = bounds(table)
        box = box[box[:, 2] - box[:, 0] < 180]  # known, and not cut in two at the antimeridian
        classes = sorted(pc.unique(table["class"]).drop_null().to_pylist())[:_LISTED]
        drawn = box[:: -(-len(box) // _DRAWN) or 1]
        return about | {"classes": [printable(name) for name in classes], "boxes": drawn.round(6).tolist()}

    def search(self, asked: Mapping[str, str], picture: bytes) -> list[dict[str, Any]]:
        """The answers to a sentence (`q`), or else to a picture, or else to a tile of the index (`like`).

        Args:
            asked: these, `k`, and the filters `classes` (with commas between), `bbox`, `since`, `until`, `where`.
            picture: the bytes of an image file; empty for none.
        Raises:
            ValueError: it cannot be answered; the message says why.
        """
        k = min(_whole(asked.get("k") or str(SHOWN)), _MOST)
        where = _filter(asked)
        with self._lock:
            if asked.get("q", "").strip():
                hits = self._searcher.by_text([asked["q"]], k, where)[0]
            elif picture or asked.get("like"):
                example = self._uploaded(picture) if picture else load_dates(self._image(asked["like"]))
                hits = self._searcher.by_image([example], k, where)[0]
            else:
                raise SearchError("Type a sentence or choose a picture.")
        return [_shown(hit) for hit in hits]

    def tile(self, row: int) -> bytes:
        """The picture of a row as JPEG, at most 512 pixels wide and high."""
        with self._lock:
            image = self._image(row)
        picture = load_image(image)
        picture.thumbnail((_TILE_PX, _TILE_PX))
        return _jpeg(picture)

    def reasons(self, row: str, text: str) -> list[dict[str, Any]]:
        """Where each scale looked and what each word gave; empty without a sentence or MSCMAT."""
        if not text.strip() or not self._searcher.scorer.has_match:
            return []
        with self._lock:
            pictures = load_dates(self._image(row))
            explanation, seen = explain(self._model, pictures, text), view(self._model, pictures)
        return [
            {
                "name": f"stage {scale.scale.stage}, {scale.scale.pool}",
                "logit": scale.logit,
                "parts": [(printable(part), value) for part, value in scale.parts()],
                "picture": "data:image/jpeg;base64,"
                + base64.b64encode(_jpeg(spotlight(seen, scale.positions))).decode(),
            }
            for scale in explanation.scales
        ]

    def _uploaded(self, picture: bytes) -> list[Image.Image]:
        if (dates := self._searcher.scorer.dates) > 1:
            raise SearchError(f"The index has places at {dates} dates: search by a sentence, or by a tile of it.")
        return [_decoded(picture)]

    def _image(self, row: int | str) -> CaptionedImage:
        try:
            return self._tiles[_whole(row)]
        except IndexError as error:
            raise SearchError(f"row {row}: the index has {len(self._tiles):,} images.") from error


def _decoded(picture: bytes) -> Image.Image:
    try:
        return shard_images.decode(picture)
    except Exception as error:  # Pillow raises nearly everything for one broken file or another
        raise SearchError(f"The picture cannot be read: {error}") from error


def _shown(hit: Hit) -> dict[str, Any]:
    """An answer; whatever others wrote is text without control characters."""
    assert hit.image is not None
    about = hit.image.metadata
    meta = about.get("meta")
    date = meta.get("date") if isinstance(meta, Mapping) else None
    return {
        "row": hit.row,
        "score": hit.score,
        "cosine": hit.cosine,
        "match": hit.match,
        "id": printable(hit.image.image_id),
        "class": hit.image.label and printable(hit.image.label),
        "date": date and printable(str(date)),
        "captions": [printable(caption) for caption in hit.image.captions],
        "place": _place(about),
    }


def _place(about: Mapping[str, Any]) -> dict[str, Any] | None:
    """The outline, if it is one: where no column holds it, it is what somebody wrote into JSON."""
    (wkb,) = places.outlines([about])
    return places.geojson(wkb) if wkb else None


def _filter(asked: Mapping[str, str]) -> SearchFilter | None:
    given = {name: asked[name].strip() for name in ("since", "until", "where") if asked.get(name, "").strip()}
    classes = frozenset(name.strip() for name in asked.get("classes", "").split(",") if name.strip())
    where = SearchFilter(classes=classes, bbox=_bbox(asked.get("bbox", "")), **given)
    return None if where == SearchFilter() else where


def _bbox(text: str) -> tuple[float, float, float, float] | None:
    if not text.strip():
        return None
    try:
        west, south, east, north = (float(part) for part in text.split(","))
    except ValueError as error:
        raise SearchError(f"box {text!r}: expected west, south, east, north in degrees.") from error
    return west, south, east, north


def _whole(text: int | str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise SearchError(f"{text!r} is not a whole number.") from error


def _jpeg(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=85)
    return out.getvalue()
