"""GeoTIFFs through rasterio (extra `geo`): chosen bands, any bit depth, nodata, tiles, and where on Earth it is."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..options import ImageOptions
from ..records import ImageProblem, Location, Record, Rejection, ShardError
from ..storage import store
from .prepare import EncodedImage, encode, is_measured, require_one_size

_SAMPLED_PX = 1024  # percentiles are taken from the scene at no more than this size
_METRES_PER_DEGREE = 111_320.0
_JPEG2000_EXTENSIONS = (".jp2", ".j2k")
_BESIDE = (".aux.xml", ".msk", ".ovr")
_WORLD_FILES = (".tfw", ".TFW", ".tifw", ".tiffw", ".wld", ".WLD", ".j2w")
MOST_TILES = 1_000_000
"""Of one scene: 256,000 x 256,000 pixels in tiles of 256."""


def is_geo(place: Location, options: ImageOptions) -> bool:
    """True for images that go through rasterio."""
    return options.geo and place.offset is None and place.row is None and place.url.lower().endswith((".tif", ".tiff"))


def tiled(records: Iterable[Record | Rejection], options: ImageOptions) -> Iterator[Record | Rejection]:
    """Cut scenes larger than `tile_px` into tiles, each a record of its own with the scene's captions.

    Tiles are all of full size; where the scene is no multiple of it, neighbours overlap a little.
    """
    for record in records:
        if isinstance(record, Rejection) or not options.tile_px or not is_geo(record.image, options):
            yield record
            continue
        side = options.tile_px
        try:
            width, height = _common_size(record.images)
            require_few_tiles(width, height, side, side)
        except ImageProblem as problem:
            yield Rejection(record.source, "unreadable image", str(problem))
            continue
        if max(width, height) <= side:
            yield record
            continue
        for row, top in enumerate(_starts(height, side)):
            for column, left in enumerate(_starts(width, side)):
                window = (left, top, min(side, width), min(side, height))
                name = f"{record.image_id}_r{row:03d}_c{column:03d}"
                image, *later = (replace(place, window=window) for place in record.images)
                yield replace(record, image_id=name, image=image, later=tuple(later))


def _common_size(places: Iterable[Location]) -> tuple[int, int]:
    """Width and height of a scene, at all of its dates the same."""
    sizes = []
    for place in places:
        with open_scene(place.url) as scene:
            sizes.append((scene.width, scene.height))
    require_one_size(sizes)
    return sizes[0]


def prepare(place: Location, options: ImageOptions) -> tuple[EncodedImage, dict[str, Any]]:
    """A scene or a tile of it, encoded for a shard, and its geo fields; raises what `read_pixels` raises."""
    image, geo = read_pixels(place, options)
    return encode(image, "TIFF", options), geo


def open_scene(url: str, steady: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda opener: opener) -> Any:
    """A GeoTIFF, whatever its name, or JPEG 2000 by its name, opened through rasterio, local or by any fsspec URL.

    GDAL's other formats are refused: a VRT, named .tif, can point to any file or address.

    Args:
        url: of the raster.
        steady: may wrap what opens remote files, to try again where a store fails.
    Raises:
        ImageProblem: rasterio cannot open it, or it is of another format.
        ShardError: rasterio is not installed.
    """
    try:
        import rasterio
    except ImportError as error:
        raise ShardError("--geo reads TIFFs through rasterio: pip install rasterio.") from error
    driver = "JP2OpenJPEG" if url.lower().endswith(_JPEG2000_EXTENSIONS) else "GTiff"
    try:
        with warnings.catch_warnings():  # what has no place is told by its missing CRS
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            if store.is_local(url):
                _require_regular(store.local_path(url))
                return rasterio.open(store.local_path(url), driver=driver)
            fs, path = store.filesystem(url)
            return rasterio.open(path, driver=driver, opener=steady(fs.open))
    except (rasterio.errors.RasterioIOError, OSError, store.NotReadable) as error:
        raise ImageProblem(f"rasterio cannot open it: {error}") from error


def _require_regular(path: str) -> None:
    """Refuse what is no regular file, of a raster and of what GDAL reads beside it: GDAL would wait for a pipe.

    Raises:
        NotReadable: there is one.
    """
    stem = os.path.splitext(path)[0]
    beside = [path + end for end in _BESIDE] + [stem + end for end in _WORLD_FILES]
    for found in (path, *filter(os.path.exists, beside)):
        store.require_regular(found)


def require_few_tiles(width: int, height: int, side: int, step: int) -> None:
    """Refuse a scene of more tiles than anybody means: a header of some bytes can claim any size.

    Args:
        width, height: of the scene in pixels.
        side: of a tile.
        step: from a tile to its neighbour, at most.
    Raises:
        ImageProblem: it has more than MOST_TILES.
    """
    tiles = math.prod(math.ceil(max(0, length - side) / step) + 1 for length in (width, height))
    if tiles > MOST_TILES:
        raise ImageProblem(
            f"{width} x {height} pixels make {tiles:,} tiles, more than {MOST_TILES:,} of one scene; "
            "larger tiles are fewer (--tile-px), or cut the scene into files"
        )


def read_pixels(
    place: Location, options: ImageOptions, opened: Callable[[str], Any] = open_scene
) -> tuple[Image.Image, dict[str, Any]]:
    """Read a scene or a tile of it as 8-bit bands, of a paletted one its colours; returns the image and its geo fields.

    Args:
        place: of the image.
        options: its bands, bit depth and largest size.
        opened: a context manager of the raster of a URL.
    Raises:
        ImageProblem: unreadable, nothing but nodata, an absent band, or more than `max_pixels`.
    """
    from rasterio.windows import Window

    with opened(place.url) as scene:
        left, top, width, height = place.window or (0, 0, scene.width, scene.height)
        if width * height > options.max_pixels:
            raise ImageProblem(f"{width} x {height} pixels exceed max_pixels {options.max_pixels}; cut it: --tile-px")
        bands = _bands(scene, options.bands)
        window = Window(left, top, width, height)
        try:
            values = scene.read(bands, window=window)
            measured = is_measured(values)
            # A pixel has data where any band has, as in GDAL's dataset_mask: with nodata 0, pure blue is no hole.
            valid = np.logical_or.reduce((scene.read_masks(bands, window=window) > 0) & measured)
        except Exception as error:  # rasterio raises GDAL's errors under several types
            raise ImageProblem(f"cannot be decoded: {error}") from error
        if not valid.any():
            raise ImageProblem("every pixel is nodata")
        colours = _palette(scene) if bands == [1] else None
        if colours is not None:
            values, measured = colours[:, values[0]], measured[0]
        elif values.dtype != np.uint8:
            values = _stretched(values, _limits(place.url, bands, options.percentiles, opened))
        elif (limits := _few_bits(scene, bands))[:, 1].min() < 255:
            values = _stretched(values, limits)
        values = np.where(valid & measured, values, 0).astype(np.uint8)
        pixels = values[0] if len(values) == 1 else np.moveaxis(values, 0, -1)
        geo = geo_fields(scene, place.window, bands)
    return Image.fromarray(np.ascontiguousarray(pixels)), geo


def _starts(length: int, side: int) -> list[int]:
    """Evenly spread starts of tiles that cover `length`."""
    count = math.ceil(length / side)
    return [0] if count == 1 else [round(step * (length - side) / (count - 1)) for step in range(count)]


def _bands(scene: Any, asked: tuple[str, ...]) -> list[int]:
    """Band numbers, from 1: those asked for by number or name, else red, green, blue, else the first three or one."""
    names: dict[str, int] = {}
    for number in range(scene.count, 0, -1):  # the first band of a name wins
        for name in (scene.colorinterp[number - 1].name, scene.descriptions[number - 1]):
            names[(name or "").lower()] = number
    if not asked:
        if {"red", "green", "blue"} <= set(names):
            return [names["red"], names["green"], names["blue"]]
        return [1, 2, 3] if scene.count >= 3 else [1]
    found = []
    for band in asked:
        number = int(band) if band.isdigit() else names.get(band.lower(), 0)
        if not 1 <= number <= scene.count:
            known = ", ".join(sorted(name for name in names if name))
            raise ImageProblem(f"band {band!r} does not exist; there are {scene.count} bands, named {known}")
        found.append(number)
    return found


def _palette(scene: Any) -> NDArray[np.uint8] | None:
    """Red, green, blue (3, values) of each value of the first band; None where a value is a brightness, no colour."""
    if scene.colorinterp[0].name != "palette" or scene.dtypes[0] not in ("uint8", "uint16"):
        return None
    try:
        known = scene.colormap(1)
    except ValueError:  # it is said to have one, and has none
        return None
    colours: NDArray[np.uint8] = np.zeros((3, np.iinfo(scene.dtypes[0]).max + 1), dtype=np.uint8)
    for value, colour in known.items():
        colours[:, value] = colour[:3]
    return colours


def _few_bits(scene: Any, bands: list[int]) -> NDArray[np.float64]:
    """Black and white of 8-bit bands, (bands, 2): 0 and 255, or less where the file holds fewer bits a value."""
    bits = [int(scene.tags(band, ns="IMAGE_STRUCTURE").get("NBITS", 8)) for band in bands]
    return np.array([(0, 2**each - 1) for each in bits], dtype=np.float64)


@lru_cache(maxsize=64)
def _limits_of(
    url: str, bands: tuple[int, ...], low: float, high: float, opened: Callable[[str], Any]
) -> NDArray[np.float64]:
    with opened(url) as scene:
        shape = (len(bands), min(scene.height, _SAMPLED_PX), min(scene.width, _SAMPLED_PX))
        try:
            values = scene.read(bands, out_shape=shape, masked=True)
        except Exception as error:  # as above
            raise ImageProblem(f"cannot be decoded: {error}") from error
    known = [band.compressed()[is_measured(band.compressed())] for band in values]
    return np.array([np.percentile(band, (low, high)) if band.size else (0, 1) for band in known])


def _limits(
    url: str, bands: list[int], percentiles: tuple[float, float], opened: Callable[[str], Any]
) -> NDArray[np.float64]:
    """What becomes black and white, per band and of the whole scene, so that its tiles look alike: (bands, 2)."""
    return _limits_of(url, tuple(bands), *percentiles, opened)


def _stretched(values: NDArray[Any], limits: NDArray[np.float64]) -> NDArray[np.float64]:
    low, high = limits[:, 0, None, None], limits[:, 1, None, None]
    scaled = (values.astype(np.float64) - low) / np.maximum(high - low, 1e-12)
    return np.asarray(np.nan_to_num(np.clip(scaled, 0, 1) * 255).round())


def geo_fields(
    scene: Any, window: tuple[int, int, int, int] | None = None, bands: list[int] | None = None
) -> dict[str, Any]:
    """What is known of a scene or a window of it: bands, CRS, bounds in that CRS, ground sample distance in metres.

    A CRS that has no metres (a local one) gives no distance, pixels that nobody has placed give no CRS. Of a raster
    that is turned against the axes of its CRS, its four `corners`, too, which its bounds do not tell.
    """
    left, top, width, height = window or (0, 0, scene.width, scene.height)
    geo: dict[str, Any] = {"bands": bands} if bands else {}
    if scene.crs and not scene.transform.is_identity:  # GDAL's word for no transform: these are pixels, no place
        at = scene.transform
        corners = [(left, top), (left + width, top), (left + width, top + height), (left, top + height)]
        easts = [at.a * column + at.b * row + at.c for column, row in corners]
        norths = [at.d * column + at.e * row + at.f for column, row in corners]
        geo |= {"crs": scene.crs.to_string(), "bounds": [min(easts), min(norths), max(easts), max(norths)]}
        if at.b or at.d:
            geo["corners"] = [list(corner) for corner in zip(easts, norths, strict=True)]
        gsd_m = _gsd_m(scene, sum(norths) / 4)
        if gsd_m is not None:
            geo["gsd_m"] = round(gsd_m, 4)
    if window:
        geo |= {"scene": store.base_name(scene.name), "window": list(window)}
    return geo


def _gsd_m(scene: Any, latitude: float) -> float | None:
    """Ground sample distance in metres: the side of a square as large as a pixel; None where the CRS does not tell."""
    area = abs(scene.transform.determinant)
    if scene.crs.is_geographic:
        metres = math.sqrt(area) * _METRES_PER_DEGREE
        return metres * math.sqrt(math.cos(math.radians(latitude))) if abs(latitude) <= 90 else None
    try:
        return math.sqrt(area) * float(scene.crs.linear_units_factor[1])
    except Exception:  # a local CRS; rasterio raises GDAL's errors under several types
        return None
