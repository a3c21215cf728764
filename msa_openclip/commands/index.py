"""`msa-openclip index`: shards, images or tiles of scenes to an index on disk; ranks of torchrun share the work."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence

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
    add_number(group, "--segment-images", "unit of resuming", default=SEGMENT_IMAGES)
    add_progress(group)


def run(parsed: argparse.Namespace) -> int:
    """Build or extend an index, or verify, convert, export or import one."""
    if parsed.model in _WITHOUT_MODEL:
        return _WITHOUT_MODEL[parsed.model](parsed.index, parsed.others)
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


def _verify(folder: str, others: Sequence[str]) -> int:
    from ..search.verify import verify_index

    if others:
        raise UsageError("verify takes one index")
    found = verify_index(folder)
    for problem in found.problems:
        print(printable(problem))
    if not found.problems:
        counts = f"{found.images} images in {found.segments} segments, {found.rejected} left out"
        print(f"{folder}: {counts}; every file is as it was written.")
    return 1 if found.problems else 0


def _export(folder: str, others: Sequence[str]) -> int:
    from ..search.exchange import export_index

    if len(others) != 1:
        raise UsageError("export takes an index and a folder to write to")
    print(f"{others[0]}: {export_index(folder, others[0])} images as GeoParquet, with their vectors")
    return 0


def _import(folder: str, others: Sequence[str]) -> int:
    from ..search.exchange import import_partitions

    if not others:
        raise UsageError("import takes an index and Parquet files to read")
    done = import_partitions(folder, others)
    print(f"{folder}: {done.added} images added, {done.known} were there already")
    return 0


def _convert(folder: str, others: Sequence[str]) -> int:
    from ..search.convert import convert_index

    if len(others) != 1:
        raise UsageError("convert takes the old index and a folder for the new one")
    print(f"{others[0]}: {convert_index(folder, others[0])} images; {folder} may be deleted")
    return 0


_WITHOUT_MODEL = {"verify": _verify, "export": _export, "import": _import, "convert": _convert}
"""Words in the place of the model, and what they do with the index and what comes behind it."""
