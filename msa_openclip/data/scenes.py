"""GeoTIFF and COG scenes as tiles: windows to be read on the fly, no intermediate files (extra `geo`).

    tiles, skipped = read_scenes(["scenes/*.tif"], Tiling(tile_px=512, overlap_px=64))
    build_index(model, tiles, "tiles.index")

A tile is a `CaptionedImage` whose location has a window; its metadata holds what the raster says (CRS, bounds, ground
sample distance) and where it lies on Earth in WGS84 (`footprint`, `bbox`).
"""

from __future__ import annotations

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
from .streams import StreamError, is_absent, retrying, version_of

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
        """Windows that cover a scene of so many pixels, row by row.

        Raises:
            ImageProblem: there are more of them than anybody means.
        """
        geotiff.require_few_tiles(width, height, self.tile_px, self.tile_px - self.overlap_px)
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
        sources: scenes, folders of scenes, or patterns such as `scenes/*.tif`, in which `*` stands for no slash and
            `**` for any number of folders; local or fsspec URLs.
        tiling: how they are cut.
        metadata: joins the metadata of every tile.
    Raises:
        EvalDataError: a source does not exist or holds no scene, or nothing is left.
        StreamError: a store cannot be reached.
    """
    tiling = tiling or Tiling()
    tiles: list[CaptionedImage] = []
    skipped: list[Skipped] = []
    for url in (scene for source in sources for scene in _expand(source)):
        try:
            tiles += _tiles(url, tiling, metadata or {}, skipped)
        except (ImageProblem, StreamError) as problem:
            skipped.append(Skipped(url, reason_to_skip(problem)))
    if not tiles:
        raise nothing_left(", ".join(sources), skipped, "no scene")
    return tiles, skipped


def read_scene(url: str, tiling: Tiling, metadata: dict[str, Any]) -> tuple[list[CaptionedImage], list[Skipped]]:
    """Tiles of one scene, whose address is taken as it stands, and which of them were left out.

    Raises:
        ImageProblem: it is absent or broken.
        StreamError: its store cannot be reached.
    """
    skipped: list[Skipped] = []
    return list(_tiles(url, tiling, metadata, skipped)), skipped


def reason_to_skip(problem: ImageProblem | StreamError) -> str:
    """Why a scene is left out of a list.

    Raises:
        StreamError: its store cannot be reached, which says nothing of the scene: ranks, or the same command later,
            would make other lists.
    """
    if isinstance(problem, StreamError) and not is_absent(problem):
        raise problem
    return str(problem)


def nothing_left(what: str, skipped: Sequence[Skipped], otherwise: str) -> EvalDataError:
    """What to raise where no tile is left: with the first of those left out, or why there was none."""
    why = f"first {skipped[0].file}: {skipped[0].reason.rstrip('.')}" if skipped else otherwise
    return EvalDataError(f"{what}: no tile can be used; {why}.")


def _expand(source: str) -> list[str]:
    """The scenes of a folder or pattern; a single scene is itself, also where its name looks like a pattern."""
    signs = "*[" if source.startswith(("http://", "https://")) else "*?["  # behind the ? of a URL stands a signature
    path = source.partition("?")[0] if "?" not in signs else source
    try:
        if any(sign in source for sign in signs):
            found = retrying(source, lambda: _matching(source))
        elif path.lower().endswith(SCENE_EXTENSIONS):
            return [source]
        else:
            found = retrying(source, lambda: _below(source))
    except StreamError as error:
        raise EvalDataError(str(error)) from error
    if not found:
        raise EvalDataError(f"{source}: no scene; expected files that end in {' or '.join(SCENE_EXTENSIONS)}.")
    return found


def _matching(source: str) -> list[str]:
    """What has just this name, file or folder, else the files that match it."""
    if store.is_file(source):
        return [source]
    return _below(source) if store.is_folder(source) else store.matching(source)


def _below(folder: str) -> list[str]:
    names = (name for name in sorted(store.listing(folder)) if name.lower().endswith(SCENE_EXTENSIONS))
    return [store.join(folder, name) for name in names]


def _tiles(url: str, tiling: Tiling, metadata: dict[str, Any], skipped: list[Skipped]) -> Iterator[CaptionedImage]:
    version = scene_version(url)
    with steady_scene(url) as scene:
        windows = tiling.windows(scene.width, scene.height)
        nodata = _nodata_shares(scene, windows)
        for window, share in zip(windows, nodata, strict=True):
            reason = _too_empty(scene, window, share, tiling.max_nodata)
            if reason:
                skipped.append(Skipped(f"{url} {window}", reason))
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
    place = footprint(geo["crs"], geo["bounds"], geo.get("corners")) if "crs" in geo else {}
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


def _too_empty(scene: Any, window: Window, share: float, most: float) -> str | None:
    """Why a tile is left out for its share of pixels without data, as a small mask tells it; None: it is kept."""
    left, top, width, height = window
    if most == 1 and share == 1:  # a small mask passes over a few pixels, which are to be kept here
        return (
            None
            if _mask(scene, window=((top, top + height), (left, left + width))).any()
            else "none of its pixels has data"
        )
    return f"about {share:.0%} of its pixels have no data" if share > most else None


def _mask(scene: Any, **part: Any) -> NDArray[np.uint8]:
    """Where a scene has data in any band, not 0; of a window, or in another size."""
    try:
        mask: NDArray[np.uint8] = scene.dataset_mask(**part)
    except Exception as error:  # rasterio raises GDAL's errors under several types
        raise ImageProblem(f"its mask cannot be read: {error}") from error
    return mask


def _nodata_shares(scene: Any, windows: Sequence[Window]) -> list[float]:
    """The share of pixels without data in each window, from one small read of the scene's mask."""
    side = min(window[2] for window in windows), min(window[3] for window in windows)
    shrink = max(1, min(side) // _MASK_PX)
    height, width = math.ceil(scene.height / shrink), math.ceil(scene.width / shrink)
    mask = _mask(scene, out_shape=(height, width))
    if mask.all():
        return [0.0] * len(windows)
    return [
        float((mask[top // shrink : -(-(top + h) // shrink), left // shrink : -(-(left + w) // shrink)] == 0).mean())
        for left, top, w, h in windows
    ]
