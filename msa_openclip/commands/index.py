"""`msa-openclip index`: shards, images or tiles of scenes to an index on disk; ranks of torchrun share the work."""

from __future__ import annotations

import argparse
import os
import time

from ..search.options import SEGMENT_IMAGES
from ..shards.arguments import Commands, add_command, add_number, add_progress
from ..shards.output import printable
from .options import MODEL, add_batches, add_loading, add_nearest
from .sources import add_sources, read_sources


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
    add_sources(command)
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
    images = read_sources(parsed)

    from ..distributed import Peers
    from ..search.build import build_index
    from ..search.index import ImageIndex
    from ..search.nearest import nearest
    from .inputs import load_model

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


def _verify(folder: str) -> int:
    from ..search.verify import verify_index

    found = verify_index(folder)
    for problem in found.problems:
        print(printable(problem))
    if not found.problems:
        counts = f"{found.images} images in {found.segments} segments, {found.rejected} left out"
        print(f"{folder}: {counts}; every file is as it was written.")
    return 1 if found.problems else 0
