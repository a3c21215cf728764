"""The plan: every sample's shard and place, fixed from the records alone, before any image is read.

Records wait in one temporary file, and the order is an array of offsets into it, so memory holds about 20 bytes a
sample however large the data is. Samples are ordered by a keyed hash of seed, split and image id: a global shuffle
that depends on no generator's version, no worker count and no order of the input.
"""

from __future__ import annotations

import math
import tempfile
from array import array
from collections.abc import Iterable
from hashlib import blake2b, sha256
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..options import BuildOptions
from ..records import SPLITS, Location, Record, Rejection
from ..storage import store

_LEAST_SAMPLES = 8  # per shard, when we choose the number of shards
_BESIDE_IMAGE = 3072  # bytes of a sample: three headers, text and JSON, with their padding
_SIZED_IMAGES = 200  # images measured to estimate the size of all


class Sample(NamedTuple):
    """One sample of a shard; `caption` is None where a sample holds all captions of the image."""

    record: Record
    caption: int | None


class ShardPlan(NamedTuple):
    """One shard of one split: its file name and which rows of the split's order it takes."""

    split: str
    file: str
    start: int
    stop: int


class Plan:
    """Reads records once, then hands out the samples of each shard.  Use as a context manager."""

    def __init__(self, records: Iterable[Record | Rejection], options: BuildOptions) -> None:
        self.options = options
        self.rejections: list[Rejection] = []
        self.images: dict[str, int] = dict.fromkeys(SPLITS, 0)
        self.dates = 1
        """Images of a sample, of each."""
        self._spool = tempfile.TemporaryFile()  # noqa: SIM115 -- closed by __exit__
        self._orders: dict[str, NDArray[np.uint64]] = {}
        self._digest = sha256()
        self._measured: list[int] = []
        self._spool_all(records)
        self.shards = [shard for split in SPLITS for shard in self._cut(split)]

    def __enter__(self) -> Plan:
        return self

    def __exit__(self, *_: object) -> None:
        self._spool.close()

    @property
    def digest(self) -> str:
        """SHA-256 over all records: two builds with the same digest and options give the same shards."""
        return self._digest.hexdigest()

    def size(self, split: str) -> int:
        """Samples of a split."""
        return len(self._orders.get(split, ()))

    def estimated_bytes(self, split: str) -> int:
        """About how large a split's shards will be, if its images pass untouched; from the sizes of some of them."""
        image_bytes = sum(self._measured) / max(1, len(self._measured))
        return round(self.size(split) * (self.dates * image_bytes + _BESIDE_IMAGE))

    def samples(self, shard: ShardPlan) -> list[Sample]:
        """The samples of a shard in their order."""
        found = []
        for offset, caption in self._orders[shard.split][shard.start : shard.stop].tolist():
            self._spool.seek(offset)
            record = Record.from_line(self._spool.readline())
            found.append(Sample(record, caption if self.options.layout == "pair" else None))
        return found

    def images_newer_than(self, time_ns: int) -> list[str]:
        """Local files of images, or tars of them, that were changed later than this."""
        self._spool.seek(0)
        urls = dict.fromkeys(place.url for line in self._spool for place in Record.from_line(line).images)
        return [url for url in urls if store.changed_ns(url) > time_ns]

    def _spool_all(self, records: Iterable[Record | Rejection]) -> None:
        rows = {split: array("Q") for split in SPLITS}
        for record in records:
            if isinstance(record, Rejection):
                self.rejections.append(record)
                continue
            self._measure(record.image)
            self.dates = len(record.images)
            line = record.to_line()
            self._digest.update(line)
            offset = self._spool.tell()
            self._spool.write(line)
            self.images[record.split] += 1
            for index in range(len(record.captions) if self.options.layout == "pair" else 1):
                rows[record.split].extend((self._rank(record, index), offset, index))
        for split, found in rows.items():
            if found:
                table = np.frombuffer(found, dtype=np.uint64).reshape(-1, 3)
                self._orders[split] = table[np.argsort(table[:, 0], kind="stable"), 1:]

    def _rank(self, record: Record, caption: int) -> int:
        name = f"{self.options.seed} {record.split} {caption} {record.image_id}"
        return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big")

    def _measure(self, place: Location) -> None:
        if len(self._measured) < _SIZED_IMAGES:
            try:
                self._measured.append(place.size if place.size is not None else store.size(place.url))
            except (OSError, NotImplementedError, TypeError):
                return  # an http server need not say; only the estimate suffers

    def _cut(self, split: str) -> list[ShardPlan]:
        samples = self.size(split)
        if not samples:
            return []
        count = min(self.options.shards or self._shards_for(split), samples)
        bounds = [round(index * samples / count) for index in range(count + 1)]
        prefix = f"{self.options.name}-{split}" if self.options.name else split
        return [
            ShardPlan(split, f"{prefix}-{index:06d}.tar", bounds[index], bounds[index + 1]) for index in range(count)
        ]

    def _shards_for(self, split: str) -> int:
        """Enough for `shard_mb`, in a multiple of the readers, unless shards got tiny."""
        by_size = math.ceil(self.estimated_bytes(split) / (self.options.shard_mb * 1e6))
        readers = self.options.readers
        wanted = math.ceil(by_size / readers) * readers
        return max(1, min(wanted, self.size(split) // _LEAST_SAMPLES))
