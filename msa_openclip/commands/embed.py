"""`msa-openclip embed`: the vectors of an archive as GeoParquet files, by any number of workers."""

from __future__ import annotations

import argparse
import os
import time
from typing import TYPE_CHECKING

from ..embedding.options import ENGINES, PARTITION_IMAGES
from ..evaluation.options import ENCODER_PRECISIONS
from ..shards.arguments import MOST_WORKERS, Commands, add_choice, add_command, add_number, add_progress
from .options import MODEL, add_device
from .sources import add_sources, name_left_out, read_sources

if TYPE_CHECKING:
    from ..embedding.partitions import Written


def add(commands: Commands) -> None:
    """Arguments and help."""
    command = add_command(
        commands,
        "embed",
        run,
        "images to vectors in GeoParquet files, on any number of workers",
        description="Write the vectors of images partition by partition; called again it goes on where it was "
        "interrupted.\n`msa-openclip index import INDEX 'PARTS/*.parquet'` makes an index of the files.",
        examples=[
            "msa-openclip embed MSA-ViT-B=epoch_9.pt parts --scenes 'scenes/*.tif' --tile-px 512",
            "torchrun --nproc-per-node 8 -m -- msa_openclip embed MSA-ViT-B=epoch_9.pt parts --stac catalog.json",
            "msa-openclip embed MSA-ViT-B=epoch_9.pt parts --windows tiles.parquet --engine ray --workers 32",
        ],
        resumes=True,
    )
    command.add_argument("model", metavar="MODEL", help=MODEL)
    command.add_argument("parts", metavar="PARTS", help="folder of the files, also s3:// and other fsspec URLs")
    add_sources(command)
    group = command.add_argument_group("running")
    add_device(group)
    text = "of the image tower; auto: bf16 where the processor computes in it; give it where machines differ"
    add_choice(group, "--precision", text, ENCODER_PRECISIONS)
    add_number(group, "--batch-size", "images that the tower takes at once", default=32)
    add_number(group, "--readers", "threads of a worker that read and decode", default=1, most=MOST_WORKERS)
    add_number(group, "--partition-images", "images in a file, the unit of resuming", default=PARTITION_IMAGES)
    add_choice(group, "--engine", "who does the work: this process, or workers of a Ray cluster", ENGINES)
    add_number(group, "--workers", "of --engine ray, one core each", default=1, most=MOST_WORKERS)
    add_progress(group)


def run(parsed: argparse.Namespace) -> int:
    """Embed a list of images."""
    images = read_sources(parsed)

    from tqdm import tqdm

    from ..distributed import Peers
    from ..embedding.embedder import Embedder
    from ..embedding.job import embed
    from .inputs import require_device

    device = _device_of_rank(parsed.device)
    require_device(device)
    embedder = Embedder(
        parsed.model,
        device=device,
        precision=parsed.precision,
        batch_size=parsed.batch_size,
        readers=parsed.readers,
    )
    peers = Peers(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    start = time.perf_counter()
    shown = parsed.progress and peers.rank == 0
    with tqdm(desc="embedding", unit=" images", leave=False, disable=not shown) as bar:

        def advance(written: Written) -> None:
            bar.update(written.rows + len(written.left_out))

        found = embed(
            images,
            embedder,
            parsed.parts,
            partition_images=parsed.partition_images,
            engine=parsed.engine,
            workers=parsed.workers,
            peers=peers,
            report=advance,
        )
    name_left_out(found.left_out, "images")
    seconds = time.perf_counter() - start
    rank = f"rank {peers.rank}: " if peers.world_size > 1 else ""
    print(
        f"{rank}{parsed.parts}: {found.rows} images in {found.partitions} partitions, {found.new} of them new, "
        f"{len(found.left_out)} images left out, {seconds:.1f} s"
    )
    return 0


def _device_of_rank(device: str) -> str:
    """`cuda` under torchrun is the GPU of this rank."""
    local_rank = os.environ.get("LOCAL_RANK")
    return f"{device}:{local_rank}" if device == "cuda" and local_rank else device
