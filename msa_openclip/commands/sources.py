"""Where the images of an archive come from: shards, a folder, scenes that are cut into tiles, lists of windows."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..shards.arguments import add_number
from ..shards.exit_codes import UsageError
from ..shards.output import printable
from .options import share

if TYPE_CHECKING:
    from ..data.captioned import CaptionedImage
    from ..data.scenes import Skipped

_SOURCES = ("shards", "folder", "scenes", "stac", "windows")
_NAMED = 5
"""Images that cannot be used are named up to so many, and counted beyond."""


def add_sources(command: argparse.ArgumentParser) -> None:
    """The sources, of which `read_sources` wants one, and the options of tiles."""
    sources = command.add_mutually_exclusive_group()
    sources.add_argument("--shards", metavar="PATTERN", help="WebDataset shards, e.g. 'data/train-{000..063}.tar'")
    sources.add_argument("--folder", metavar="FOLDER", help="folder of images, also TIFF")
    text = "GeoTIFF or COG scenes, cut into tiles on the fly: file, folder or pattern"
    sources.add_argument("--scenes", metavar="PATTERN", help=text)
    text = "STAC catalogue, collection or item; its scenes are cut likewise"
    sources.add_argument("--stac", metavar="HREF", help=text)
    text = "list of windows of scenes, in pixels or by geometry: GeoParquet or CSV"
    sources.add_argument("--windows", metavar="FILE", help=text)
    group = command.add_argument_group("tiles of --scenes and --stac")
    add_number(group, "--tile-px", "side of a tile", default=256)
    add_number(group, "--overlap-px", "by how much neighbours overlap at least", default=0, least=0)
    group.add_argument(
        "--max-nodata",
        type=share,
        default=0.5,
        metavar="SHARE",
        help="leave out tiles with a larger share of pixels without data (default: %(default)s)",
    )
    group.add_argument("--asset", metavar="KEY", help="asset of STAC items (default: a GeoTIFF, `visual` first)")


def read_sources(parsed: argparse.Namespace) -> list[CaptionedImage]:
    """The images of the source; scenes and tiles that cannot be used are counted, the first of them named.

    Raises:
        UsageError: no source is given.
        EvalDataError: the source cannot be read.
    """
    if not any(getattr(parsed, name) for name in _SOURCES):
        names = " ".join(f"--{name}" for name in _SOURCES)
        raise UsageError(f"one of the arguments {names} is required")
    from ..data.readers import read_folder, read_shards

    if parsed.shards:
        return read_shards(parsed.shards)
    if parsed.folder:
        return read_folder(parsed.folder)

    from ..data.repeats import without_repeats
    from ..data.scenes import Tiling, read_scenes
    from ..data.stac import read_stac
    from ..data.windows import read_windows

    if parsed.windows:
        tiles, skipped = read_windows(parsed.windows)
    else:
        tiling = Tiling(tile_px=parsed.tile_px, overlap_px=parsed.overlap_px, max_nodata=parsed.max_nodata)
        tiles, skipped = (
            read_scenes([parsed.scenes], tiling)
            if parsed.scenes
            else read_stac(parsed.stac, asset=parsed.asset, tiling=tiling)
        )
    kept, repeated = without_repeats(tiles)
    name_left_out([*skipped, *repeated], "scenes or tiles")
    return kept


def name_left_out(skipped: Sequence[Skipped], what: str) -> None:
    """Say on stderr which of so many could not be used."""
    for row in skipped[:_NAMED]:
        print(printable(f"left out: {row.file}: {row.reason}"), file=sys.stderr)
    if len(skipped) > _NAMED:
        print(f"left out: {len(skipped) - _NAMED} more {what}", file=sys.stderr)
