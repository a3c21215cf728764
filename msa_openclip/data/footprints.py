"""Where a tile lies on Earth: its outline in WGS84 as GeoJSON, also across the antimeridian and over a pole."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

_POINTS_A_SIDE = 8  # straight lines of a projection are curves in degrees
_WGS84 = "EPSG:4326"


def footprint(crs: str, bounds: Sequence[float]) -> dict[str, Any]:
    """`footprint` (GeoJSON geometry) and `bbox` (west, south, east, north) in degrees of WGS84.

    Where the tile crosses the antimeridian, west is greater than east, as GeoJSON (RFC 7946, 5.2) has it, and the
    outline is cut in two there. Over a pole, and where the projection has no answer for an outline, it is the bbox.

    Args:
        crs: of the bounds, as rasterio reads it.
        bounds: west, south, east, north in that CRS.
    Returns:
        Nothing where the CRS cannot be told or has no place on Earth.
    """
    from rasterio.crs import CRS
    from rasterio.errors import CRSError, RasterioError
    from rasterio.warp import transform_bounds

    try:
        source = CRS.from_user_input(crs)
        west, south, east, north = transform_bounds(source, _WGS84, *bounds, densify_pts=2 * _POINTS_A_SIDE)
    except (CRSError, RasterioError, ValueError):
        return {}
    bbox = [max(-180.0, min(180.0, west)), max(-90.0, south), max(-180.0, min(180.0, east)), min(90.0, north)]
    if bbox[0] > bbox[2] or east - west >= 180:
        return {"footprint": _boxes(bbox), "bbox": bbox}
    return {"footprint": _outline(source, bounds), "bbox": bbox}


def _outline(source: Any, bounds: Sequence[float]) -> dict[str, Any]:
    from rasterio.warp import transform

    west, south, east, north = bounds
    steps = [step / _POINTS_A_SIDE for step in range(_POINTS_A_SIDE)]
    corners = [(west, south), (east, south), (east, north), (west, north), (west, south)]
    ring = [
        (x0 + step * (x1 - x0), y0 + step * (y1 - y0))
        for (x0, y0), (x1, y1) in itertools.pairwise(corners)
        for step in steps
    ]
    longitudes, latitudes = transform(source, _WGS84, *zip(*ring, strict=True))
    points = [[round(x, 9), round(y, 9)] for x, y in zip(longitudes, latitudes, strict=True)]
    return {"type": "Polygon", "coordinates": [[*points, points[0]]]}


def _boxes(bbox: Sequence[float]) -> dict[str, Any]:
    west, south, east, north = bbox
    spans = [(west, 180.0), (-180.0, east)] if west > east else [(west, east)]
    rings = [[[w, south], [e, south], [e, north], [w, north], [w, south]] for w, e in spans]
    if len(rings) == 1:
        return {"type": "Polygon", "coordinates": rings}
    return {"type": "MultiPolygon", "coordinates": [[ring] for ring in rings]}
