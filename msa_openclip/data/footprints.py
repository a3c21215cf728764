"""Where a tile lies on Earth: its outline in WGS84 as GeoJSON, also across the antimeridian and over a pole.

An outline may be larger than its tile. It is smaller by a thousandth of the tile's side at most (`_TOLERANCE`), so that
a search by place misses no tile.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

_POINTS_A_SIDE = 8  # straight lines of a projection are curves in degrees
_TOLERANCE = 1e-3  # of a tile's width or height: how far an outline's straight lines may leave the true curves
_BEYOND_POLE = 2.0  # degrees: centres of pixels at 90 degrees, rounding; beyond it is no latitude
_LARGEST_STEP = 90.0  # degrees of longitude between neighbouring points; with more nobody knows which way round
_WGS84 = "EPSG:4326"
Points = NDArray[np.float64]
"""(n, 2), east and north or longitude and latitude."""


def footprint(crs: str, bounds: Sequence[float], corners: Sequence[Sequence[float]] | None = None) -> dict[str, Any]:
    """`footprint` (GeoJSON geometry) and `bbox` (west, south, east, north) in degrees of WGS84.

    Where the tile crosses the antimeridian, west is greater than east, as GeoJSON (RFC 7946, 5.2) has it, and the
    outline is the bbox, cut in two there. Over a pole, near one, and wherever straight lines between a few points do
    not follow the projection's, it is the bbox, too. Longitudes beyond 180 (grids of 0 to 360) are wrapped.

    Args:
        crs: of the bounds, as rasterio reads it.
        bounds: west, south, east, north in that CRS.
        corners: the four of a tile that is turned against the axes of its CRS, in order around it.
    Returns:
        Nothing where the CRS cannot be told or has no place on Earth.
    """
    west, south, east, north = bounds
    quad = np.array(corners or [(west, south), (east, south), (east, north), (west, north)], dtype=np.float64)
    if _source(crs) is None or not np.isfinite(quad).all():
        return {}
    fine = _degrees(crs, _ring(quad))
    if fine is None:
        return _of_bounds(crs, bounds)
    outline, sag = fine[::2].round(9), _sag(fine)
    west, east = _settled(outline[:, 0].min(), outline[:, 0].max())
    goes_around = np.ptp(fine[:, 0]) >= 360
    poles = [pole for pole in (-90.0, 90.0) if _near_pole(crs, quad, pole)]
    if (
        not poles
        and not goes_around
        and west >= -180
        and east <= 180
        and (sag <= _TOLERANCE * np.ptp(fine, axis=0)).all()
    ):
        outline[:, 0] = outline[:, 0].clip(west, east)
        bbox = [*outline.min(axis=0).tolist(), *outline.max(axis=0).tolist()]
        return {
            "footprint": {"type": "Polygon", "coordinates": [[*outline.tolist(), outline[0].tolist()]]},
            "bbox": bbox,
        }
    return _boxes(_bbox(fine, sag, poles))


@lru_cache(maxsize=256)
def _source(crs: str) -> Any:
    """A CRS as rasterio has it; None where it cannot be told or is none of Earth's (a local one, Mars).

    That is asked once, since GDAL prints on stderr what it does not support.
    """
    from rasterio.crs import CRS
    from rasterio.errors import CRSError
    from rasterio.warp import transform

    try:
        source = CRS.from_user_input(crs)
    except (CRSError, ValueError):
        return None
    try:
        transform(_WGS84, source, [0.0], [0.0])
    except Exception as error:  # rasterio keeps GDAL's classes of errors to itself
        return None if type(error).__name__ == "CPLE_NotSupportedError" else source
    return source


def _ring(quad: Points) -> Points:
    """Points around a tile, twice as many as its outline has: every other one tells how well the outline follows."""
    steps = np.arange(2 * _POINTS_A_SIDE)[:, None] / (2 * _POINTS_A_SIDE)
    return np.concatenate([a + steps * (b - a) for a, b in itertools.pairwise([*quad, quad[0]])])


def _degrees(crs: str, ring: Points) -> Points | None:
    """Longitudes and latitudes of points around a tile, the centre's longitude within -180 and 180.

    Longitudes go on beyond 180 rather than jump. None where one point has no place on Earth.
    """
    from rasterio.warp import transform

    east, north = ring.T
    if _source(crs).is_geographic:
        if np.abs(north).max() > 90 + _BEYOND_POLE:
            return None
        north = north.clip(-90, 90)
    try:
        found = np.array(transform(_source(crs), _WGS84, east, north)[:2], dtype=np.float64).T
    except Exception:  # rasterio raises GDAL's errors under several types, of which some are its own alone
        return None
    if not np.isfinite(found).all() or np.abs(found[:, 1]).max() > 90:
        return None
    found[:, 0] = np.unwrap(found[:, 0], period=360)
    found[:, 0] -= 360 * np.floor(((found[:, 0].min() + found[:, 0].max()) / 2 + 180) / 360)
    return found


def _sag(fine: Points) -> NDArray[np.float64]:
    """How far straight lines between every other point miss the ones between, (2,) in degrees."""
    ends = fine[::2]
    found: NDArray[np.float64] = np.abs(fine[1::2] - (ends + np.roll(ends, -1, axis=0)) / 2).max(axis=0)
    return found


def _near_pole(crs: str, quad: Points, pole: float) -> bool:
    """Whether a pole lies in a tile or within a step of it, where a few points do not tell the way around it."""
    at = _pole(crs, pole)
    step = np.ptp(quad, axis=0).max() / _POINTS_A_SIDE
    return at is not None and bool(((quad.min(axis=0) - step <= at) & (at <= quad.max(axis=0) + step)).all())


@lru_cache(maxsize=256)
def _pole(crs: str, latitude: float) -> NDArray[np.float64] | None:
    """Where a pole is in a CRS, (2,); None where it is nowhere, or a line, as in degrees."""
    from rasterio.warp import transform

    try:
        found = np.array(transform(_WGS84, _source(crs), [0.0, 120.0, -120.0], [latitude] * 3)[:2]).T
    except Exception:  # as above
        return None
    at: NDArray[np.float64] = found[0]
    return at if np.isfinite(found).all() and np.ptp(found, axis=0).max() < 1e-3 else None


def _bbox(fine: Points, sag: NDArray[np.float64], poles: Sequence[float]) -> list[float]:
    """West, south, east, north of what no outline of a few points follows: all longitudes if it may hold a pole."""
    west, south = (fine.min(axis=0) - sag).tolist()
    east, north = (fine.max(axis=0) + sag).tolist()
    steps = np.abs(np.diff(fine[:, 0], append=fine[0, 0]))
    if steps.max() > _LARGEST_STEP and not poles:
        poles = [math.copysign(90.0, south + north)]
    if poles or east - west >= 360:
        west, east = -180.0, 180.0
    west, east = _settled(west, east)
    return [_wrapped(west), max(-90.0, min(south, *poles, 90.0)), _wrapped(east), min(90.0, max(north, *poles, -90.0))]


def _settled(west: float, east: float) -> tuple[float, float]:
    """Longitudes that are beyond 180 by rounding alone, at 180."""
    slack = _TOLERANCE * (east - west)
    return (
        max(-180.0, float(west)) if west >= -180 - slack else float(west),
        min(180.0, float(east)) if east <= 180 + slack else float(east),
    )


def _wrapped(longitude: float) -> float:
    return longitude if -180 <= longitude <= 180 else (longitude + 180) % 360 - 180


def _of_bounds(crs: str, bounds: Sequence[float]) -> dict[str, Any]:
    """Of a tile that lies on Earth in part: what GDAL makes of its bounds, if anything."""
    from rasterio.warp import transform_bounds

    try:
        west, south, east, north = transform_bounds(_source(crs), _WGS84, *bounds, densify_pts=2 * _POINTS_A_SIDE)
    except Exception:  # as above
        return {}
    if not np.isfinite((west, south, east, north)).all() or not -90 <= south <= north <= 90:
        return {}
    return _boxes([_wrapped(west), south, _wrapped(east), north])


def _boxes(bbox: list[float]) -> dict[str, Any]:
    """The bbox and an outline of it, in two parts where it crosses the antimeridian."""
    west, south, east, north = bbox
    spans = [(west, 180.0), (-180.0, east)] if west > east else [(west, east)]
    rings = [[[w, south], [e, south], [e, north], [w, north], [w, south]] for w, e in spans]
    if len(rings) == 1:
        return {"footprint": {"type": "Polygon", "coordinates": rings}, "bbox": bbox}
    return {"footprint": {"type": "MultiPolygon", "coordinates": [[ring] for ring in rings]}, "bbox": bbox}
