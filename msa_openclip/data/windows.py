"""Tiles that a list names: windows of scenes in pixels, or places on Earth, from GeoParquet, Parquet or CSV.

tiles, skipped = read_windows("fields.parquet")
build_index(model, tiles, "fields.index")

href (or source, scene, url)           the scene; a relative one lies beside the list
col_off, row_off, width, height        a window of it in pixels, or
geometry                               a place in WGS84 (WKB; in CSV WKT), of which the bounds are taken
id, class, caption, datetime           optional; without an id it is the scene with its window; in CSV href, id, class
                                       and caption are texts word for word: 001, NA
...                                    every other column is kept as metadata (`meta`)
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import date, datetime
from typing import Any

from ..shards.records import ImageProblem
from ..shards.storage import store
from .captioned import CaptionedImage, EvalDataError
from .outlines import OutlineError, from_wkb, from_wkt
from .scenes import Skipped, Window, nothing_left, reason_to_skip, scene_version, window_tile
from .steady_scenes import steady_scene
from .streams import StreamError, read_if_there

LIST_EXTENSIONS = (".parquet", ".geoparquet", ".csv")
_SCENE_NAMES = ("href", "source", "scene", "url")
_WINDOW_NAMES = ("col_off", "row_off", "width", "height")
_GEOMETRY_NAMES = ("geometry", "wkt")
_OWN = frozenset((*_SCENE_NAMES, *_WINDOW_NAMES, *_GEOMETRY_NAMES, "id", "class", "caption", "datetime", "bbox"))
_TEXTS = (*_SCENE_NAMES, *_GEOMETRY_NAMES, "id", "class", "caption")
_EPS = 1e-3  # of a pixel: rounding of a projection there and back must not add a row of pixels
_DEGREES = ("EPSG:4326", "OGC:CRS84", "EPSG:4979", "OGC:CRS84h")


def read_windows(path: str) -> tuple[list[CaptionedImage], list[Skipped]]:
    """Tiles of a list, scene by scene in the order in which the list first names them, and what was left out.

    Args:
        path: the list, local or by any fsspec URL.
    Raises:
        EvalDataError: it cannot be read, lacks a column, is in other coordinates than WGS84, or no tile is left.
        StreamError: the store of a scene cannot be reached.
    """
    rows = _read(path)
    by_scene: dict[str, list[Mapping[str, Any]]] = {}
    skipped: list[Skipped] = []
    for number, row in enumerate(rows):
        href = next((row[name] for name in _SCENE_NAMES if row.get(name)), None)
        if href is None:
            skipped.append(Skipped(f"{path}: row {number}", "no scene"))
        else:
            by_scene.setdefault(store.join(store.parent(path), str(href)), []).append(row)
    tiles: list[CaptionedImage] = []
    for url, wanted in by_scene.items():
        try:
            tiles += _tiles(url, wanted, skipped)
        except (ImageProblem, StreamError) as problem:
            skipped.append(Skipped(url, f"{reason_to_skip(problem)} ({len(wanted)} windows)"))
    if not tiles:
        raise nothing_left(path, skipped, "it has no rows")
    return tiles, skipped


def _tiles(url: str, rows: list[Mapping[str, Any]], skipped: list[Skipped]) -> Iterator[CaptionedImage]:
    version = scene_version(url)
    with steady_scene(url) as scene:
        for row in rows:
            window = _window(scene, row)
            if isinstance(window, str):
                skipped.append(Skipped(f"{url} {_wanted(row)}", window))
                continue
            meta = {name: _plain(value) for name, value in row.items() if name not in _OWN and value is not None}
            when = row.get("datetime")
            known = ({"date": _plain(when)} if when is not None else {}) | meta
            tile = window_tile(url, version, scene, window, {"meta": known} if known else {})
            captions = (str(row["caption"]),) if row.get("caption") else ()
            label = str(row["class"]) if row.get("class") is not None else None
            name = str(row["id"]) if row.get("id") is not None else tile.image_id
            yield replace(tile, image_id=name, captions=captions, label=label)


def _window(scene: Any, row: Mapping[str, Any]) -> Window | str:
    """The window that a row asks for, or why there is none."""
    if any(row.get(name) is not None for name in _WINDOW_NAMES):
        try:
            left, top, width, height = (_whole(row[name]) for name in _WINDOW_NAMES)
        except (KeyError, TypeError, ValueError, OverflowError):
            return f"{', '.join(_WINDOW_NAMES)} must be whole numbers, all of them"
        if left < 0 or top < 0 or width < 1 or height < 1 or left + width > scene.width or top + height > scene.height:
            return f"not within the {scene.width} x {scene.height} pixels of the scene"
        return left, top, width, height
    bounds = _bounds(next((row[name] for name in _GEOMETRY_NAMES if row.get(name)), None))
    if bounds is None:
        return "neither a window nor a geometry that can be read"
    found = _window_at(scene, bounds)
    if isinstance(found, str) and bounds[2] > 180:  # a scene in degrees may lie on the other side of the antimeridian
        west, south, east, north = bounds
        found = _window_at(scene, (west - 360, south, east - 360, north))
    return found


def _whole(value: Any) -> int:
    """A whole number, also one written as 10.0 or as text.

    Raises:
        TypeError, ValueError, OverflowError: it is none.
    """
    number = int(value)
    if not isinstance(value, str) and number != value:
        raise ValueError(f"{value} is no whole number")
    return number


def _window_at(scene: Any, bounds: tuple[float, ...]) -> Window | str:
    """The pixels of a scene that cover bounds in WGS84, as far as it has them."""
    from rasterio.warp import transform_bounds

    if not scene.crs:
        return "the scene has no CRS, so that a place cannot be found in it"
    try:
        west, south, east, north = transform_bounds("EPSG:4326", scene.crs, *bounds)
        at = ~scene.transform
    except Exception as error:  # rasterio and affine raise several types, for another planet, for pixels of no size
        return f"its place cannot be found in {scene.crs}: {error}"
    corners = [(x, y) for x in (west, east) for y in (south, north)]
    columns = [at.a * x + at.b * y + at.c for x, y in corners]
    rows = [at.d * x + at.e * y + at.f for x, y in corners]
    if not all(map(math.isfinite, (*columns, *rows))):
        return f"its place cannot be found in {scene.crs}"
    left, right = max(0, math.floor(min(columns) + _EPS)), min(scene.width, math.ceil(max(columns) - _EPS))
    top, bottom = max(0, math.floor(min(rows) + _EPS)), min(scene.height, math.ceil(max(rows) - _EPS))
    if left >= right or top >= bottom:
        return "lies outside the scene"
    return left, top, right - left, bottom - top


def _bounds(geometry: Any) -> tuple[float, ...] | None:
    """West, south, east, north of WKB or WKT."""
    if geometry is None:
        return None
    try:
        import shapely  # noqa: F401 - for its absence
    except ImportError as error:
        raise EvalDataError("a list of geometries needs shapely: pip install 'msa_openclip[archive]'.") from error
    try:
        shape = from_wkb([geometry])[0] if isinstance(geometry, bytes) else from_wkt(str(geometry))
    except OutlineError:
        return None
    return None if shape is None or shape.is_empty else _around(shape)


def _around(shape: Any) -> tuple[float, ...]:
    """The bounds of a geometry; of one that is cut at the antimeridian, and so touches 180 and -180, on beyond 180."""
    import shapely

    west, south, east, north = shape.bounds
    if east - west < 360 - _EPS:
        return west, south, east, north
    parts = [part.bounds for part in shapely.get_parts(shape) if not part.is_empty]
    sides = [(left + 360, right + 360) if right < 0 else (left, right) for left, _, right, _ in parts]
    near, far = min(left for left, _ in sides), max(right for _, right in sides)
    return (near, south, far, north) if far - near < east - west else (west, south, east, north)


def _wanted(row: Mapping[str, Any]) -> str:
    """What a row is called when it is left out."""
    if row.get("id") is not None:
        return str(row["id"])
    return str(tuple(row.get(name) for name in _WINDOW_NAMES)) if row.get("col_off") is not None else "geometry"


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, (datetime, date)):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, bytes):
        return value.hex()
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def _read(path: str) -> list[dict[str, Any]]:
    """The rows of a list.

    Raises:
        EvalDataError: it is none.
    """
    try:
        import pyarrow as pa
        import pyarrow.csv
        import pyarrow.parquet
    except ImportError as error:
        raise EvalDataError("a list of windows needs pyarrow: pip install 'msa_openclip[archive]'.") from error
    try:
        data = read_if_there(path)
    except StreamError as error:
        raise EvalDataError(str(error)) from error
    if data is None:
        raise EvalDataError(f"{path}: not found, or it may not be read.")
    try:
        table = _read_csv(data) if path.lower().endswith(".csv") else pyarrow.parquet.read_table(io.BytesIO(data))
    except pa.ArrowException as error:
        raise EvalDataError(
            f"{path}: not a list that can be read ({error}); known are {', '.join(LIST_EXTENSIONS)}."
        ) from error
    _require_columns(path, table.column_names)
    _require_degrees(path, (table.schema.metadata or {}).get(b"geo"))
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _read_csv(data: bytes) -> Any:
    """A table of CSV, its kinds guessed, but for names: 001 and 1e5 stay what they are, and NA is one."""
    import pyarrow as pa
    import pyarrow.csv

    def read(**options: Any) -> Any:
        texts = dict.fromkeys(_TEXTS, pa.string())
        how = pyarrow.csv.ConvertOptions(strings_can_be_null=True, column_types=texts, **options)
        return pyarrow.csv.read_csv(io.BytesIO(data), convert_options=how)

    table = read()
    # What is empty can be said for all columns of a reading only, and in columns of numbers NA is that.
    names = [name for name in _TEXTS if table.column_names.count(name) == 1]
    texts = read(null_values=[""], include_columns=names) if names else table
    for name in names:
        table = table.set_column(table.column_names.index(name), name, texts[name])
    return table


def _require_columns(path: str, names: list[str]) -> None:
    has = ", ".join(names)
    if not set(_SCENE_NAMES) & set(names):
        raise EvalDataError(f"{path}: no column of scenes, {', '.join(_SCENE_NAMES)}; it has {has}.")
    if not set(_WINDOW_NAMES) <= set(names) and not set(_GEOMETRY_NAMES) & set(names):
        raise EvalDataError(f"{path}: neither {', '.join(_WINDOW_NAMES)} nor geometry; it has {has}.")


def _require_degrees(path: str, geo: bytes | None) -> None:
    """GeoParquet says in which coordinates its geometries are; without a word it is WGS84."""
    if geo is None:
        return
    try:
        known = json.loads(geo)
        crs = known["columns"][known["primary_column"]].get("crs")
        code = f"{crs['id']['authority']}:{crs['id']['code']}" if crs else _DEGREES[0]
    except (ValueError, KeyError, TypeError, AttributeError):
        code = "unknown"
    if code not in _DEGREES:
        raise EvalDataError(f"{path}: geometries in {code}; expected WGS84. In GeoPandas: frame.to_crs(4326).")
