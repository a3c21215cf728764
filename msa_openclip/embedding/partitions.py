"""A list of images -> one whole file of vectors for each part of the list, however often the job is killed.

    parts = partitions(read_folder("tiles"))
    for part in parts[rank::world_size]:
        write_vectors(part, embedder, "parts")     # skips what is whole

    PARTS/NUMBER-LIST-DIGEST.parquet          a partition as `search.schema` has it, rows along a Hilbert curve
    PARTS/NUMBER-LIST-DIGEST.left-out.jsonl   a line for each of its images that cannot be read: id, source, window, why

LIST is a digest of the names and places in the whole list, by which workers of different lists are told.  DIGEST is
that of the model and of the rows with their content, so that a name stands for what is in the file, and whoever writes
a partition, and whenever, writes the same.  A file has its name once it is whole and on the disk.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..data.captioned import CaptionedImage
from ..data.pixels import batch_spans
from ..data.readers import content_of
from ..data.scenes import Skipped
from ..search.schema import Product, to_table, write_partition
from ..shards.storage import store
from .embedder import Embedder, EmbedError
from .options import PARTITION_IMAGES

_NAME = re.compile(r"(\d{6,})-(?:([0-9a-f]{8})-)?[0-9a-f]{16}\.parquet")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Partition:
    """A part of a list of images, to be encoded and written as one file."""

    number: int
    """Its place in the list, from 0."""
    of: int
    """How many parts the list has."""
    images: Sequence[CaptionedImage]
    list_digest: str = "0" * 8
    """Tells the list and the size of its parts from others, in 8 hexadecimal digits."""


@dataclass(frozen=True)
class Written:
    """What became of a partition."""

    file: str
    rows: int
    """Images in it."""
    left_out: tuple[Skipped, ...]
    """Images that cannot be read."""
    new: bool
    """False: it was there."""


def partitions(images: Sequence[CaptionedImage], size: int = PARTITION_IMAGES) -> list[Partition]:
    """The list in parts of so many images; the same list gives the same parts.

    Raises:
        EmbedError: `size` is less than 1.
    """
    if size < 1:
        raise EmbedError(f"partition_images: {size} must be at least 1.")
    spans = batch_spans(len(images), size)
    digest = _list_digest(images, size)
    return [Partition(number, len(spans), images[span.start : span.stop], digest) for number, span in enumerate(spans)]


def _list_digest(images: Sequence[CaptionedImage], size: int) -> str:
    """Of names and places; content, which may have to be read for it, is in the digest of each part."""
    digest = hashlib.sha256(f"{size}\n".encode())
    for image in images:
        digest.update(f"{image.image_id!r} {image.location!r}\n".encode())
    return digest.hexdigest()[:8]


def write_vectors(partition: Partition, embedder: Embedder, folder: str) -> Written:
    """Encode a partition and write it, unless it is whole already.

    Args:
        partition: what to encode.
        embedder: of the model, with vectors in float16.
        folder: where to, a path or fsspec URL.
    Raises:
        EmbedError: the folder holds a part of another list, or this one of another model.
        StreamError: a store cannot be reached.
    """
    images = [
        image if image.content else replace(image, content=content_of(image.location)) for image in partition.images
    ]
    table = to_table(images)
    name = _name(partition, table, embedder.product)
    store.make_folder(folder)
    there = store.names(folder)
    _tidy(folder, there, name)
    _require_one_list(folder, there, partition, name)
    url = store.join(folder, name)
    rows = _rows_of_whole(url)
    if rows is not None:
        return Written(url, rows, tuple(_read_left_out(url)), new=False)
    columns = embedder(table)
    unreadable = columns.filter(pc.is_valid(columns["error"]))
    left_out = [
        {**{key: row[key] for key in ("id", "source", "window")}, "why": row["error"]} for row in unreadable.to_pylist()
    ]
    # First what is left out, so that a whole partition always has its list beside it.
    if left_out:
        lines = "".join(json.dumps(row) + "\n" for row in left_out)
        _despite_others(lambda: store.write_text(_left_out_file(url), lines))
    else:
        store.remove(_left_out_file(url))
    whole = columns.filter(pc.is_null(columns["error"])).drop_columns(["error"])
    _despite_others(lambda: write_partition(url, whole, embedder.product))
    # Of two workers who started at once with different lists, the later finds out here.
    _require_one_list(folder, store.names(folder), partition, name)
    return Written(url, len(whole), tuple(map(_skipped, left_out)), new=True)


def _despite_others(write: Callable[[], None]) -> None:
    """Write once more where another worker, given the same partition, took the half-written file for a left-over."""
    try:
        write()
    except FileNotFoundError:
        write()


def _name(partition: Partition, table: pa.Table, product: Product) -> str:
    digest = hashlib.sha256(json.dumps([product.fingerprint, dict(product.settings)], sort_keys=True).encode())
    for row in table.to_pylist():
        digest.update(json.dumps(row, sort_keys=True, default=_plain).encode())
    return f"{partition.number:06d}-{partition.list_digest}-{digest.hexdigest()[:16]}.parquet"


def _plain(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


def _tidy(folder: str, there: Iterable[str], name: str) -> None:
    """Remove, of the files that are there, what a killed worker left of this partition."""
    for other in there:
        if store.target_of_temporary(other) in (name, _left_out_file(name)):
            store.remove(store.join(folder, other))


def _require_one_list(folder: str, there: Iterable[str], partition: Partition, name: str) -> None:
    """Refuse a folder in which there are parts of another list: their images would be there twice, or missing.

    Raises:
        EmbedError: the folder holds a part of another list, or this one of another model.
    """
    for other in there:
        found = _NAME.fullmatch(other)
        if found and other != name and (int(found[1]) == partition.number or found[2] != partition.list_digest):
            raise EmbedError(
                f"{store.join(folder, other)}: part {int(found[1])} of another list, model or size of partitions. "
                "Give the same ones again to go on, or another folder: an index is made of any number of folders."
            )


def _rows_of_whole(url: str) -> int | None:
    """Rows of a partition; None if there is none, or half of one, as a copy that was broken off leaves it."""
    if not store.exists(url):
        return None
    try:
        with store.open_read(url) as file:
            return int(pq.read_metadata(file).num_rows)
    except (pa.ArrowInvalid, OSError) as error:
        _log.warning("%s: not a whole file (%s); it is written again.", url, error)
        return None


def _left_out_file(url: str) -> str:
    return url.removesuffix(".parquet") + ".left-out.jsonl"


def _read_left_out(url: str) -> Iterator[Skipped]:
    path = _left_out_file(url)
    if store.exists(path):
        yield from (_skipped(json.loads(line)) for line in store.read_bytes(path).splitlines())


def _skipped(row: Mapping[str, Any]) -> Skipped:
    window = f" {tuple(row['window'].values())}" if row["window"] else ""
    return Skipped(f"{row['source']}{window}", row["why"])
