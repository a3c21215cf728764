"""`msa-openclip index`: shards or a folder of images to an index on disk; under torchrun its ranks share the work."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence

from ..data.captioned import EvalDataError
from ..data.readers import read_folder, read_shards
from ..distributed import Peers
from ..evaluation.loading import load
from ..search.build import build_index
from ..search.index import ImageIndex
from ..search.nearest import KINDS, nearest
from . import options as eval_options


def main(arguments: Sequence[str] | None = None) -> int:
    """Build or extend an index."""
    parsed = _parser().parse_args(arguments)
    if bool(parsed.shards) == bool(parsed.folder):
        raise EvalDataError("give either --shards or --folder.")
    images = read_shards(parsed.shards) if parsed.shards else read_folder(parsed.folder)
    model = load(parsed.model, parsed.device, parsed.precision)
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
    )
    seconds = time.perf_counter() - start
    if peers.rank == 0:
        index = ImageIndex(parsed.index, model)
        nearest(index, parsed.nearest)
        print(f"{parsed.index}: {len(index)} images, {new} of them new, {new / max(seconds, 1e-9):.1f} images/s")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="msa-openclip index",
        description="Index images for search; called again it adds what is new, or goes on where it was interrupted.",
    )
    parser.add_argument("model", metavar="MODEL", help="NAME=CHECKPOINT, hf-hub:ORG/REPO or local-dir:FOLDER")
    parser.add_argument("index", metavar="INDEX", help="folder of the index")
    parser.add_argument("--shards", help="WebDataset shards, e.g. 'data/train-{000..063}.tar'")
    parser.add_argument("--folder", help="folder of images, also TIFF")
    parser.add_argument("--nearest", choices=KINDS, default="auto", help="global search (default: %(default)s)")
    eval_options.add_loading(parser)
    parser.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=0, help="image decoders (default: %(default)s)")
    parser.add_argument("--segment-images", type=int, default=4096, help="unit of resuming (default: %(default)s)")
    return parser
