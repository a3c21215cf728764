"""Where images lie on Earth, for Parquet: outlines in WGS84 as WKB, their bounds, an order that keeps neighbours close.

Shapes: n images; bounds are (n, 4), xmin, ymin, xmax, ymax in degrees, NaN where nothing is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_HILBERT_BITS = 16  # a cell is 600 m wide at the equator


class PlaceError(ValueError):
    """Places on Earth cannot be told; the message says what is missing."""


def shapely() -> Any:
    """The module, which only indexes of places on Earth need."""
    try:
        import shapely as module
    except ImportError as error:
        raise PlaceError("places on Earth need shapely: pip install 'msa_openclip[archive]'.") from error
    return module


def outlines(about: Sequence[Mapping[str, Any]]) -> list[bytes | None]:
    """WKB of every outline in WGS84, out of `geo` (`footprint`, or `crs` and `bounds`); None where there is none."""
    return [_outline(known.get("geo")) for known in about]


def _outline(geo: Any) -> bytes | None:
    if not isinstance(geo, Mapping):
        return None
    drawn = geo.get("footprint") or _footprint(geo)
    if not drawn:
        return None
    module = shapely()
    try:
        shape = module.geometry.shape(drawn)
        west, south, east, north = shape.bounds  # of an empty shape NaN, which compares as false
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, module.errors.ShapelyError):
        return None
    on_earth = west >= -180 and east <= 180 and south >= -90 and north <= 90
    return bytes(module.to_wkb(shape)) if on_earth else None


def _footprint(geo: Mapping[str, Any]) -> Any:
    """The outline of bounds in a CRS, where rasterio is there to tell it."""
    if not (geo.get("crs") and geo.get("bounds")):
        return None
    from ..data.footprints import footprint

    try:
        return footprint(str(geo["crs"]), geo["bounds"]).get("footprint")
    except (ImportError, TypeError, ValueError):
        return None


def geojson(wkb: bytes) -> dict[str, Any]:
    """A geometry as GeoJSON."""
    module = shapely()
    drawn = module.geometry.mapping(module.from_wkb(wkb))
    return {"type": drawn["type"], "coordinates": _lists(drawn["coordinates"])}


def _lists(value: Any) -> Any:
    return [_lists(part) for part in value] if isinstance(value, (tuple, list)) else value


def bounds(wkb: Sequence[bytes | None]) -> NDArray[np.float64]:
    """(n, 4).  An outline that is cut in two at the antimeridian spans all longitudes: nobody's box test misses it."""
    if not any(wkb):
        return np.full((len(wkb), 4), np.nan)
    module = shapely()
    found: NDArray[np.float64] = module.bounds(module.from_wkb(np.array(wkb, dtype=object)))
    return found


def geometry_types(wkb: Sequence[bytes | None]) -> list[str]:
    """The kinds of geometry that occur, as GeoParquet names them."""
    if not any(wkb):
        return []
    module = shapely()
    kinds = module.get_type_id(module.from_wkb(np.array(wkb, dtype=object)))
    return sorted(
        {str(module.GeometryType(kind).name).title().replace("Multip", "MultiP") for kind in kinds if kind >= 0}
    )


def hilbert_order(bounds: NDArray[np.float64]) -> NDArray[np.int64]:
    """Numbers (n,) of the rows along a Hilbert curve through their centres; rows without a place last, as they come."""
    centre = np.nan_to_num((bounds[:, :2] + bounds[:, 2:]) / 2)
    side = 1 << _HILBERT_BITS
    cell = np.clip((centre / (360, 180) + 0.5) * side, 0, side - 1).astype(np.int64)
    distance = _along_curve(cell[:, 0], cell[:, 1])
    distance[np.isnan(bounds[:, 0])] = side * side
    return np.argsort(distance, kind="stable").astype(np.int64)


def _along_curve(x: NDArray[np.int64], y: NDArray[np.int64]) -> NDArray[np.int64]:
    """How far along the Hilbert curve cells lie, from the coarsest quadrant to the finest."""
    distance = np.zeros_like(x)
    for bit in reversed(range(_HILBERT_BITS)):
        right, upper = (x >> bit) & 1, (y >> bit) & 1
        distance += ((3 * right) ^ upper) << (2 * bit)
        # The two lower quadrants hold the curve turned, the right one of them mirrored, too.
        flip = (upper == 0) & (right == 1)
        last = (1 << (bit + 1)) - 1
        x, y = np.where(flip, last - (x & last), x & last), np.where(flip, last - (y & last), y & last)
        x, y = np.where(upper == 0, y, x), np.where(upper == 0, x, y)
    return distance
