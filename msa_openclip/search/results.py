"""Answers of a search for other tools: GeoJSON that GIS programs open, or a STAC ItemCollection."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from .schema import instant
from .searcher import Hit

Answers: TypeAlias = Iterable[tuple[str, Sequence[Hit]]]
"""Queries, each with what was found."""


def geojson(answers: Answers) -> dict[str, Any]:
    """A FeatureCollection of all images found, each with the query, its rank and scores; geometry null if unknown."""
    features = [
        {
            "type": "Feature",
            "id": _id(hit),
            "geometry": _geo(hit).get("footprint"),
            "properties": _known(hit) | _scores(query, rank, hit),
        }
        for query, rank, hit in _found(answers)
    ]
    return {"type": "FeatureCollection", "features": features}


def item_collection(answers: Answers) -> dict[str, Any]:
    """A STAC ItemCollection of all images found; its items name the file or URL of their image as asset `image`."""
    return {"type": "FeatureCollection", "features": [_item(*found) for found in _found(answers)]}


def _found(answers: Answers) -> list[tuple[str, int, Hit]]:
    """Query, rank and hit of all images; captions that were found for an image are none."""
    return [
        (query, rank, hit) for query, hits in answers for rank, hit in enumerate(hits, start=1) if hit.image is not None
    ]


def _item(query: str, rank: int, hit: Hit) -> dict[str, Any]:
    assert hit.image is not None
    known = _known(hit)
    when = instant(str(known.get("date", "")))
    times: dict[str, Any] = {"datetime": when.isoformat().replace("+00:00", "Z") if when else None}
    if when is None:  # STAC wants a span then: any time
        times |= {"start_datetime": "0001-01-01T00:00:00Z", "end_datetime": "9999-12-31T23:59:59Z"}
    outline = _geo(hit).get("footprint")
    return {
        "type": "Feature",
        "stac_version": "1.1.0",
        "id": re.sub(r"[/\\]", "_", _id(hit)),  # no part of a path
        "geometry": outline,
        **({"bbox": _bbox(outline)} if outline else {}),
        "properties": known | _scores(query, rank, hit) | times,
        "links": [],
        "assets": {"image": {"href": hit.image.location.url, "roles": ["data"]}},
    }


def _id(hit: Hit) -> str:
    assert hit.image is not None
    return hit.image.image_id


def _geo(hit: Hit) -> Mapping[str, Any]:
    assert hit.image is not None
    geo = hit.image.metadata.get("geo")
    return geo if isinstance(geo, Mapping) else {}


def _bbox(outline: Mapping[str, Any]) -> list[float]:
    from . import places

    return [float(side) for side in places.shapely().geometry.shape(outline).bounds]


def _scores(query: str, rank: int, hit: Hit) -> dict[str, Any]:
    return {"query": query, "rank": rank, "score": hit.score, "cosine": hit.cosine, "match": list(hit.match)}


def _known(hit: Hit) -> dict[str, Any]:
    """What is known of an image beside its place: its `meta`, class, captions, file and window."""
    assert hit.image is not None
    meta, location = hit.image.metadata.get("meta"), hit.image.location
    return {
        **(_finite(dict(meta)) if isinstance(meta, Mapping) else {}),
        "class": hit.image.label,
        "captions": list(hit.image.captions),
        "source": location.url,
        "window": list(location.window) if location.window else None,
    }


def _finite(value: Any) -> Any:
    """With null for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
