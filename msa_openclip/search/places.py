"""Where images lie on Earth, for Parquet: outlines in WGS84 as WKB, their bounds, an order that keeps neighbours close.

Shapes: n images; bounds are (n, 4), xmin, ymin, xmax, ymax in degrees, NaN where nothing is known.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.outlines import from_wkb, from_wkt

Box = tuple[float, float, float, float]
"""West, south, east, north in degrees of WGS84."""
EARTH: Box = (-180.0, -90.0, 180.0, 90.0)
NOWHERE: Box = (np.nan, np.nan, np.nan, np.nan)
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
    """WKB of every outline in WGS84, out of `geo` (`footprint`, or `crs` with `bounds` or `corners`), or None."""
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
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError, module.errors.ShapelyError):
        return None
    on_earth = west >= -180 and east <= 180 and south >= -90 and north <= 90
    return bytes(module.to_wkb(shape)) if on_earth else None


def _footprint(geo: Mapping[str, Any]) -> Any:
    """The outline of bounds in a CRS, where rasterio is there to tell it."""
    if not (geo.get("crs") and geo.get("bounds")):
        return None
    from ..data.footprints import footprint

    try:
        return footprint(str(geo["crs"]), geo["bounds"], geo.get("corners")).get("footprint")
    except (ImportError, TypeError, ValueError):
        return None


def geojson(wkb: bytes) -> dict[str, Any]:
    """A geometry as GeoJSON.

    Raises:
        OutlineError: it is no WKB.
    """
    found: dict[str, Any] = _plain(shapely().geometry.mapping(from_wkb([wkb])[0]))
    return found


def _plain(value: Any) -> Any:
    """With lists in place of tuples."""
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (tuple, list)) else value


def or_boxes(wkb: Sequence[bytes | None], bounds: NDArray[np.float64]) -> list[bytes | None]:
    """The outlines, and where there is none, the box of its bounds (n, 4), if these are known."""
    boxed = np.flatnonzero(np.array([one is None for one in wkb], np.bool_) & np.isfinite(bounds).all(axis=1))
    found = list(wkb)
    if len(boxed):
        module = shapely()
        for row, drawn in zip(boxed.tolist(), module.to_wkb(module.box(*bounds[boxed].T)), strict=True):
            found[row] = bytes(drawn)
    return found


def bounds(wkb: Sequence[bytes | None]) -> NDArray[np.float64]:
    """(n, 4).  An outline that is cut in two at the antimeridian spans all longitudes: nobody's box test misses it."""
    if not any(wkb):
        return np.full((len(wkb), 4), np.nan)
    module = shapely()
    found: NDArray[np.float64] = module.bounds(from_wkb(wkb))
    return found


def extent(bounds: NDArray[np.float64]) -> Box | None:
    """The box around all bounds (n, 4); None if nothing is known."""
    known = bounds[~np.isnan(bounds).any(axis=1)]
    if not len(known):
        return None
    west, south = known[:, :2].min(axis=0).tolist()
    east, north = known[:, 2:].max(axis=0).tolist()
    return west, south, east, north


def geometry_types(wkb: Sequence[bytes | None]) -> list[str]:
    """The kinds of geometry that occur, as GeoParquet names them."""
    if not any(wkb):
        return []
    module = shapely()
    kinds = module.get_type_id(from_wkb(wkb))
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


def box(bbox: Sequence[float]) -> Any:
    """The region between west, south, east and north in degrees; west of 170 and east of -170 crosses the antimeridian.

    Raises:
        PlaceError: it is no box on Earth.
    """
    west, south, east, north = bbox
    if not (-180 <= west <= 180 and -180 <= east <= 180 and -90 <= south <= north <= 90):
        raise PlaceError(
            f"bbox {west:g},{south:g},{east:g},{north:g}: expected WEST,SOUTH,EAST,NORTH in degrees of WGS84, "
            "longitudes within -180 and 180, latitudes within -90 and 90, south <= north."
        )
    return _on_earth(shapely().box(west, south, east if west <= east else east + 360, north))


def polygon(text: str) -> Any:
    """The region that WKT or GeoJSON (a geometry, feature or collection of features) draws in degrees of WGS84.

    Raises:
        PlaceError: it is neither, empty, crosses itself, or does not lie on Earth.
    """
    module = shapely()
    try:
        text = text.lstrip("\ufeff \t\r\n")
        drawn = _geojson_shape(module, json.loads(text)) if text.startswith("{") else from_wkt(text)
        west, south, east, north = drawn.bounds
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, module.errors.ShapelyError) as error:
        raise PlaceError(f"polygon: neither WKT nor GeoJSON ({error}).") from error
    if not drawn.is_valid:
        raise PlaceError(f"polygon: {module.is_valid_reason(drawn)}; a polygon must not cross itself.")
    if not (-360 <= west <= east <= 360 and -90 <= south <= north <= 90):
        raise PlaceError(f"polygon: it spans {west:g},{south:g},{east:g},{north:g}, expected degrees of WGS84.")
    return _on_earth(drawn)


def _geojson_shape(module: Any, content: Any) -> Any:
    if content["type"] == "FeatureCollection":
        return module.union_all([_geojson_shape(module, feature) for feature in content["features"]])
    return module.geometry.shape(content["geometry"] if content["type"] == "Feature" else content)


def _on_earth(region: Any) -> Any:
    """A region with what lies beyond the antimeridian moved to the other side."""
    module = shapely()
    earth = module.box(-180, -90, 180, 90)
    found: list[Any] = []
    for part in module.get_parts(region):
        turns = [module.transform(part, lambda at, by=by: np.add(at, (by, 0))) for by in (-360, 0, 360)]
        pieces = module.get_parts(module.intersection(turns, earth))
        # A polygon that ends at one side touches the other, in a line.
        found += [piece for piece in pieces if module.get_dimensions(piece) == module.get_dimensions(part)]
    return module.union_all(found)


def boxes(region: Any) -> NDArray[np.float64]:
    """The bounds (k, 4) of each part of a region."""
    module = shapely()
    found: NDArray[np.float64] = module.bounds(module.get_parts(region))
    return found


def touch(boxes: NDArray[np.float64], bounds: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which bounds (n, 4) have a point in common with one of some boxes (k, 4), (n,)."""
    found = np.zeros(len(bounds), dtype=np.bool_)
    xmin, ymin, xmax, ymax = bounds.T  # NaN, where nothing is known, compares as false
    for west, south, east, north in boxes:
        found |= (xmin <= east) & (xmax >= west) & (ymin <= north) & (ymax >= south)
    return found


def overlap(
    region: Any, bounds: NDArray[np.float64], outlines: Callable[[NDArray[np.int64]], Sequence[bytes]]
) -> NDArray[np.bool_]:
    """Which outlines overlap or touch a region, (n,).

    Args:
        region: of `box` or `polygon`.
        bounds: (n, 4) of the outlines.
        outlines: WKB of some of them, by number; asked only for those that their bounds do not decide.
    """
    module = shapely()
    found = np.zeros(len(bounds), dtype=np.bool_)
    near = touch(boxes(region), bounds)
    xmin, ymin, xmax, ymax = bounds.T
    for part in module.get_parts(region):
        west, south, east, north = part.bounds
        if part.equals(module.box(west, south, east, north)):
            found |= (xmin >= west) & (xmax <= east) & (ymin >= south) & (ymax <= north)
    open_rows = np.flatnonzero(near & ~found).astype(np.int64)
    module.prepare(region)
    found[open_rows] = module.intersects(region, from_wkb(outlines(open_rows)))
    return found
