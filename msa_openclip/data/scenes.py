"""GeoTIFF and COG scenes as tiles: windows to be read on the fly, no intermediate files (extra `geo`).

    tiles, skipped = read_scenes(["scenes/*.tif"], Tiling(tile_px=512, overlap_px=64))
    build_index(model, tiles, "tiles.index")

A tile is a `CaptionedImage` whose location has a window; its metadata holds what the raster says (CRS, bounds, ground
sample distance) and where it lies on Earth in WGS84 (`footprint`, `bbox`).
"""

from __future__ import annotations

import fnmatch
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..shards.imagery import geotiff
from ..shards.records import ImageProblem, Location
from ..shards.storage import store
from .captioned import CaptionedImage, EvalDataError
from .footprints import footprint
from .steady_scenes import steady_scene
from .streams import StreamError, retrying, version_of

SCENE_EXTENSIONS = (".tif", ".tiff")
Window = tuple[int, int, int, int]
"""Column, row, width, height in pixels."""
_MASK_PX = 8  # a tile's share of nodata is told from a mask with at least so many pixels a side


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How scenes are cut.

    Raises:
        ValueError: a number is out of range.
    """

    tile_px: int = 256
    """Side of a tile. A scene that is smaller is one tile."""
    overlap_px: int = 0
    """By how much neighbours overlap at least; tiles are spread evenly, all of full size."""
    max_nodata: float = 0.5
    """Tiles with a larger share of pixels without data are left out; 1 keeps all that have any data."""

    def __post_init__(self) -> None:
        if self.tile_px < 1:
            raise ValueError(f"tile_px: {self.tile_px} must be at least 1.")
        if not 0 <= self.overlap_px < self.tile_px:
            raise ValueError(f"overlap_px: {self.overlap_px} must be at least 0 and less than tile_px {self.tile_px}.")
        if not 0 <= self.max_nodata <= 1:
            raise ValueError(f"max_nodata: {self.max_nodata} must be within 0 and 1.")

    def windows(self, width: int, height: int) -> list[Window]:
        """Windows that cover a scene of so many pixels, row by row."""
        tile_width, tile_height = min(self.tile_px, width), min(self.tile_px, height)
        return [
            (left, top, tile_width, tile_height)
            for top in self._starts(height, tile_height)
            for left in self._starts(width, tile_width)
        ]

    def _starts(self, length: int, side: int) -> list[int]:
        if length == side:
            return [0]
        steps = math.ceil((length - side) / (self.tile_px - self.overlap_px))
        return [round(step * (length - side) / steps) for step in range(steps + 1)]


class Skipped(NamedTuple):
    """A scene or tile that cannot be used, and why."""

    file: str
    reason: str


def read_scenes(
    sources: Sequence[str], tiling: Tiling | None = None, metadata: dict[str, Any] | None = None
) -> tuple[list[CaptionedImage], list[Skipped]]:
    """Tiles of scenes, in the order of the sources, and what was left out.

    Args:
        sources: scenes, folders of scenes, or patterns such as `scenes/*.tif`; local or fsspec URLs.
        tiling: how they are cut.
        metadata: joins the metadata of every tile.
    Raises:
        EvalDataError: a source does not exist or holds no scene, or nothing is left.
    """
    tiling = tiling or Tiling()
    tiles: list[CaptionedImage] = []
    skipped: list[Skipped] = []
    for url in (scene for source in sources for scene in _expand(source)):
        try:
            tiles += _tiles(url, tiling, metadata or {}, skipped)
        except (ImageProblem, StreamError) as problem:
            skipped.append(Skipped(url, str(problem)))
    if not tiles:
        why = f"first {skipped[0].file}: {skipped[0].reason}" if skipped else "no scene"
        raise EvalDataError(f"{', '.join(sources)}: no tile can be used; {why}.")
    return tiles, skipped


def _expand(source: str) -> list[str]:
    """The scenes of a folder or pattern; a single scene is itself."""
    folder, name = store.parent(source), store.base_name(source)
    if any(sign in name for sign in "*?["):
        names = [found for found in _listing(folder) if fnmatch.fnmatch(found, name)]
    elif source.lower().endswith(SCENE_EXTENSIONS):
        return [source]
    else:
        folder = source
        names = [found for found in _listing(folder) if found.lower().endswith(SCENE_EXTENSIONS)]
    if not names:
        raise EvalDataError(f"{source}: no scene; expected files that end in {' or '.join(SCENE_EXTENSIONS)}.")
    return [store.join(folder, found) for found in names]


def _listing(folder: str) -> list[str]:
    try:
        return retrying(folder, lambda: sorted(store.listing(folder)))
    except StreamError as error:
        raise EvalDataError(str(error)) from error


def _tiles(url: str, tiling: Tiling, metadata: dict[str, Any], skipped: list[Skipped]) -> Iterator[CaptionedImage]:
    version = scene_version(url)
    with steady_scene(url) as scene:
        windows = tiling.windows(scene.width, scene.height)
        nodata = _nodata_shares(scene, windows)
        for window, share in zip(windows, nodata, strict=True):
            if share > tiling.max_nodata or share == 1:
                skipped.append(Skipped(f"{url} {window}", f"{share:.0%} of its pixels have no data"))
                continue
            yield window_tile(url, version, scene, window, metadata)


def scene_version(url: str) -> str:
    """What tells a scene from later versions of itself; scenes are too large to be read for a hash.

    Raises:
        StreamError: its store cannot be asked.
    """
    return hashlib.sha256(version_of(url).encode()).hexdigest()


def window_tile(url: str, version: str, scene: Any, window: Window, metadata: dict[str, Any]) -> CaptionedImage:
    """A window of an opened scene as an image; `metadata` joins what the raster says."""
    geo = geotiff.geo_fields(scene, window)
    place = footprint(geo["crs"], geo["bounds"]) if "crs" in geo else {}
    date = _date(scene)
    meta = ({"date": date} if date else {}) | metadata.get("meta", {})
    known = {**metadata, "geo": geo | place, **({"meta": meta} if meta else {})}
    whole = window[2:] == (scene.width, scene.height)
    name = url if whole else f"{url}#{window[0]},{window[1]},{window[2]},{window[3]}"
    return CaptionedImage(name, Location(url, window=window), (), metadata=known, content=version)


def _date(scene: Any) -> str | None:
    """The ISO date of TIFF's own tag, `2020:06:30 10:15:00`."""
    stamp = (scene.tags().get("TIFFTAG_DATETIME") or "").split(" ")[0].replace(":", "-")
    return stamp if len(stamp) == 10 and stamp[:4].isdigit() and stamp[:4] != "0000" else None


def _nodata_shares(scene: Any, windows: Sequence[Window]) -> list[float]:
    """The share of pixels without data in each window, from one small read of the scene's mask."""
    side = min(window[2] for window in windows), min(window[3] for window in windows)
    shrink = max(1, min(side) // _MASK_PX)
    height, width = math.ceil(scene.height / shrink), math.ceil(scene.width / shrink)
    try:
        mask: NDArray[np.uint8] = scene.dataset_mask(out_shape=(height, width))
    except Exception as error:  # rasterio raises GDAL's errors under several types
        raise ImageProblem(f"its mask cannot be read: {error}") from error
    if mask.all():
        return [0.0] * len(windows)
    return [
        float((mask[top // shrink : -(-(top + h) // shrink), left // shrink : -(-(left + w) // shrink)] == 0).mean())
        for left, top, w, h in windows
    ]
