"""`msa-openclip index`: shards, images or tiles of scenes to an index on disk; ranks of torchrun share the work."""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import TYPE_CHECKING

from ..search.options import SEGMENT_IMAGES
from ..shards.arguments import Commands, add_command, add_number, add_progress
from ..shards.exit_codes import UsageError
from ..shards.output import printable
from .options import MODEL, add_batches, add_loading, add_nearest, share

if TYPE_CHECKING:
    from ..data.captioned import CaptionedImage

_NAMED = 5
"""Scenes and tiles that cannot be used are named up to so many, and counted beyond."""


def add(commands: Commands) -> None:
    """Arguments and help."""
    command = add_command(
        commands,
        "index",
        run,
        "images to an index on disk",
        description="Index images for search; called again it adds what is new, or goes on where it was interrupted.",
        examples=[
            "msa-openclip index MSA-ViT-B=epoch_9.pt tiles.index --shards 'tiles/train-{000000..000063}.tar'",
            "msa-openclip index MSA-ViT-B=epoch_9.pt scenes.index --scenes 'scenes/*.tif' --tile-px 512",
            "msa-openclip index verify tiles.index    # compares every file with what was written",
            "torchrun --nproc-per-node 8 -m -- msa_openclip index MSA-ViT-B=epoch_9.pt tiles.index --folder tiles",
        ],
        resumes=True,
    )
    command.add_argument("model", metavar="MODEL", help=f"{MODEL}; or `verify`, to check an index")
    command.add_argument("index", metavar="INDEX", help="folder of the index")
    sources = command.add_mutually_exclusive_group()
    sources.add_argument("--shards", metavar="PATTERN", help="WebDataset shards, e.g. 'data/train-{000..063}.tar'")
    sources.add_argument("--folder", metavar="FOLDER", help="folder of images, also TIFF")
    sources.add_argument(
        "--scenes",
        metavar="PATTERN",
        help="GeoTIFF or COG scenes, cut into tiles on the fly: file, folder or pattern",
    )
    sources.add_argument(
        "--stac", metavar="HREF", help="STAC catalogue, collection or item; its scenes are cut likewise"
    )
    _add_tiling(command)
    add_nearest(command)
    group = command.add_argument_group("running")
    add_loading(group)
    add_batches(group)
    add_number(group, "--segment-images", "unit of resuming", default=SEGMENT_IMAGES)
    add_progress(group)


def run(parsed: argparse.Namespace) -> int:
    """Build or extend an index, or verify one."""
    if parsed.model == "verify":
        return _verify(parsed.index)
    if not (parsed.shards or parsed.folder or parsed.scenes or parsed.stac):
        raise UsageError("one of the arguments --shards --folder --scenes --stac is required")

    from ..distributed import Peers
    from ..search.build import build_index
    from ..search.index import ImageIndex
    from ..search.nearest import nearest
    from .inputs import load_model

    images = _images(parsed)
    model = load_model(parsed.model, parsed)
    peers = Peers(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    start = time.perf_counter()
    new = build_index(
        model,
        images,
        parsed.index,
        batch_size=parsed.batch_size,
        workers=parsed.workers,
        segment_images=parsed.segment_images,
        peers=peers,
        progress=parsed.progress,
    )
    seconds = time.perf_counter() - start
    if peers.rank == 0:
        index = ImageIndex(parsed.index, model)
        nearest(index, parsed.nearest)
        print(f"{parsed.index}: {len(index)} images, {new} of them new, {new / max(seconds, 1e-9):.1f} images/s")
    return 0


def _add_tiling(command: argparse.ArgumentParser) -> None:
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


def _images(parsed: argparse.Namespace) -> list[CaptionedImage]:
    """What is to be indexed; tiles that cannot be used are counted, the first of them named."""
    from ..data.readers import read_folder, read_shards

    if parsed.shards:
        return read_shards(parsed.shards)
    if parsed.folder:
        return read_folder(parsed.folder)

    from ..data.scenes import Tiling, read_scenes
    from ..data.stac import read_stac

    tiling = Tiling(tile_px=parsed.tile_px, overlap_px=parsed.overlap_px, max_nodata=parsed.max_nodata)
    tiles, skipped = (
        read_scenes([parsed.scenes], tiling)
        if parsed.scenes
        else read_stac(parsed.stac, asset=parsed.asset, tiling=tiling)
    )
    for row in skipped[:_NAMED]:
        print(printable(f"left out: {row.file}: {row.reason}"), file=sys.stderr)
    if len(skipped) > _NAMED:
        print(f"left out: {len(skipped) - _NAMED} more scenes or tiles", file=sys.stderr)
    return tiles


def _verify(folder: str) -> int:
    from ..search.verify import verify_index

    found = verify_index(folder)
    for problem in found.problems:
        print(printable(problem))
    if not found.problems:
        counts = f"{found.images} images in {found.segments} segments, {found.rejected} left out"
        print(f"{folder}: {counts}; every file is as it was written.")
    return 1 if found.problems else 0
