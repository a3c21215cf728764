"""`msa-openclip index`: shards, images or tiles of scenes to an index on disk; ranks of torchrun share the work."""

from __future__ import annotations

import argparse
import os
import time

from ..search.options import SEGMENT_IMAGES
from ..shards.arguments import Commands, add_command, add_number, add_progress
from ..shards.exit_codes import UsageError
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
            "msa-openclip index export tiles.index parts    # GeoParquet, vectors included",
            "msa-openclip index import tiles.index 'parts/*.parquet'    # also of others, made with the same model",
            "msa-openclip index convert old.index tiles.index    # an index of the format before",
            "torchrun --nproc-per-node 8 -m -- msa_openclip index MSA-ViT-B=epoch_9.pt tiles.index --folder tiles",
        ],
        resumes=True,
    )
    text = f"{MODEL}; or, without any model, {', '.join(_WITHOUT_MODEL)}"
    command.add_argument("model", metavar="MODEL", help=text)
    command.add_argument("index", metavar="INDEX", help="folder of the index")
    text = "folder to export to, files to import, or the new index of `convert`"
    command.add_argument("others", metavar="PATH", nargs="*", help=text)
    add_sources(command)
    add_nearest(command)
    group = command.add_argument_group("running")
    add_loading(group)
    add_batches(group)
    add_number(group, "--segment-images", "images in a segment, the unit of resuming", default=SEGMENT_IMAGES)
    add_progress(group)


def run(parsed: argparse.Namespace) -> int:
    """Build or extend an index, or verify, convert, export or import one."""
    if parsed.model in _WITHOUT_MODEL:
        return _WITHOUT_MODEL[parsed.model](parsed)
    if parsed.others:
        raise UsageError(f"{parsed.others[0]!r}: only {', '.join(_WITHOUT_MODEL)} take more than MODEL and INDEX")
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


def _verify(parsed: argparse.Namespace) -> int:
    from ..search.verify import verify_index

    if parsed.others:
        raise UsageError("verify takes one index")
    found = verify_index(parsed.index)
    for problem in found.problems:
        print(printable(problem))
    if not found.problems:
        counts = f"{found.images} images in {found.segments} segments, {found.rejected} left out"
        print(f"{parsed.index}: {counts}; every file is as it was written.")
    return 1 if found.problems else 0


def _export(parsed: argparse.Namespace) -> int:
    from ..search.exchange import export_index

    if len(parsed.others) != 1:
        raise UsageError("export takes an index and a folder to write to")
    (out,) = parsed.others
    print(f"{out}: {export_index(parsed.index, out)} images as GeoParquet, with their vectors")
    return 0


def _import(parsed: argparse.Namespace) -> int:
    from ..search.exchange import import_partitions

    if not parsed.others:
        raise UsageError("import takes an index and Parquet files to read")
    done = import_partitions(parsed.index, parsed.others, segment_images=parsed.segment_images)
    print(f"{parsed.index}: {done.added} images added, {done.known} were there already")
    return 0


def _convert(parsed: argparse.Namespace) -> int:
    from ..search.convert import convert_index

    if len(parsed.others) != 1:
        raise UsageError("convert takes the old index and a folder for the new one")
    (new,) = parsed.others
    print(f"{new}: {convert_index(parsed.index, new)} images; {parsed.index} may be deleted")
    return 0


_WITHOUT_MODEL = {"verify": _verify, "export": _export, "import": _import, "convert": _convert}
"""Words in the place of the model, and what they do with the index and what comes behind it."""
