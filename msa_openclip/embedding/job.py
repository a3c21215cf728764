"""Embed a whole list: partition by partition in this process, in the ranks of torchrun, or on a Ray cluster."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.captioned import CaptionedImage
from ..data.repeats import without_repeats
from ..data.scenes import Skipped
from ..distributed import Peers
from ..shards.running.engines import start_ray
from .embedder import Embedder, EmbedError
from .options import ENGINES, PARTITION_IMAGES
from .partitions import Partition, Written, partitions, write_vectors


@dataclass(frozen=True)
class Embedded:
    """What became of a list, as far as this rank had to do with it."""

    partitions: int
    new: int
    """Partitions that were not there yet."""
    rows: int
    """Images with vectors."""
    left_out: tuple[Skipped, ...]
    """Images that cannot be read, or occur twice."""


def embed(
    images: Sequence[CaptionedImage],
    embedder: Embedder,
    folder: str,
    *,
    partition_images: int = PARTITION_IMAGES,
    engine: str = "here",
    workers: int = 1,
    peers: Peers | None = None,
    report: Callable[[Written], None] = lambda _: None,
) -> Embedded:
    """Write the vectors of a list as partitions; called again after an interruption, it goes on.

        embed(read_folder("tiles"), Embedder("MSA-ViT-B=epoch_9.pt"), "parts")

    Args:
        images: the list; the same list has the same partitions.
        embedder: of the model; with vectors in float16.
        folder: where to, a path or fsspec URL that all workers reach.
        partition_images: images in a partition, the unit of resuming.
        engine: `here`, or `ray`: on the cluster at RAY_ADDRESS, without one on this machine.
        workers: of Ray, each with a model of its own and one core.
        peers: this process among those that share the work by themselves, as torchrun starts them.
        report: called after each partition.
    Raises:
        EmbedError: an argument is unknown or out of range, or the folder holds parts of another list.
        StreamError: a store cannot be reached.
    """
    if engine not in ENGINES:
        raise EmbedError(f"engine: {engine!r} is unknown; choose one of {', '.join(ENGINES)}.")
    if workers < 1:
        raise EmbedError(f"workers: {workers} must be at least 1.")
    peers = peers or Peers()
    kept, repeated = without_repeats(images)
    mine = partitions(kept, partition_images)[peers.rank :: peers.world_size]
    written = []
    for part in _on_ray(mine, embedder, folder, workers) if engine == "ray" else _here(mine, embedder, folder):
        written.append(part)
        report(part)
    left_out = [row for part in written for row in part.left_out]
    return Embedded(
        partitions=len(written),
        new=sum(part.new for part in written),
        rows=sum(part.rows for part in written),
        left_out=(*(repeated if peers.rank == 0 else ()), *left_out),
    )


def _here(parts: Sequence[Partition], embedder: Embedder, folder: str) -> Iterator[Written]:
    for part in parts:
        yield write_vectors(part, embedder, folder)


def _on_ray(parts: Sequence[Partition], embedder: Embedder, folder: str, workers: int) -> Iterator[Written]:
    """Each partition as a task of Ray Data, which hands those of a worker that died to another."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise EmbedError("engine: ray is not installed; pip install 'msa_openclip[ray]'.") from error
    if not parts:
        return
    start_ray(workers)
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = [{"part": pickle.dumps(part)} for part in parts]
    tasks: Any = ray.data.from_items(rows, override_num_blocks=len(rows))
    results = tasks.map(_WriterOnRay, fn_constructor_args=(embedder, folder), concurrency=workers, num_cpus=1)
    for row in results.iter_rows():
        yield pickle.loads(row["written"])


class _WriterOnRay:
    """`write_vectors` in the form of Ray Data: a row in, a row out."""

    def __init__(self, embedder: Embedder, folder: str) -> None:
        self._embedder, self._folder = embedder, folder

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        part = pickle.loads(row["part"])
        return {"written": pickle.dumps(write_vectors(part, self._embedder, self._folder))}
