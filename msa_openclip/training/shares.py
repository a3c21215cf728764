"""Assigns shards, or ranges of their samples, to the loader workers of each rank, so that no sample is read twice."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice
from typing import Any, NamedTuple

from ..data.streams import read_if_there
from ..shards.storage import json_text, store


class ShardDataError(ValueError):
    """The shards do not fit the run; the message names them, what was found, what is expected and the remedy."""


class Share(NamedTuple):
    """Samples `start` to `stop` (exclusive; None: to the end) of a shard, of `size` samples where that is known."""

    url: str
    start: int = 0
    stop: int | None = None
    size: int | None = None


class LoaderWorker(NamedTuple):
    """One DataLoader worker of one rank, among all that read an epoch."""

    rank: int = 0
    ranks: int = 1
    worker: int = 0
    workers: int = 1


def shard_sizes(urls: Sequence[str]) -> list[int] | None:
    """Samples in each shard, from the sizes.json beside it; None where one is missing or does not name the shard."""
    folders: dict[str, dict[str, int]] = {}
    for folder in {store.parent(url) for url in urls if not url.startswith("pipe:")}:
        content = read_if_there(store.join(folder, "sizes.json"))
        if content is None:
            continue
        try:
            folders[folder] = _sizes(json_text.parse(content, "JSON"))
        except ValueError as error:
            raise ShardDataError(
                f"{folder}/sizes.json: not an object of shard names and numbers of samples ({error}). "
                "Delete it, or build it again with the shards."
            ) from error
    sizes = [folders.get(store.parent(url), {}).get(store.base_name(url)) for url in urls]
    return None if None in sizes else [size for size in sizes if size is not None]


def _sizes(content: Any) -> dict[str, int]:
    if not isinstance(content, dict):
        raise ValueError(f"it is a {type(content).__name__}")
    for name, size in content.items():
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 2**53:
            raise ValueError(f"{name}: {size!r:.40}")
    return content


def part_of(count: int, part: int, parts: int) -> tuple[int, int]:
    """Begin and end of a part of `count` things in `parts` parts that differ by one at most."""
    quotient, rest = divmod(count, parts)
    begin = part * quotient + min(part, rest)
    return begin, begin + quotient + (part < rest)


def shuffled(urls: Sequence[str], sizes: Sequence[int] | None, seed: int) -> tuple[list[str], list[int] | None]:
    """Shards and their sizes in the order of one epoch, the same for all readers."""
    order = list(range(len(urls)))
    random.Random(seed).shuffle(order)
    return [urls[i] for i in order], None if sizes is None else [sizes[i] for i in order]


def whole_shards(urls: Sequence[str], reader: LoaderWorker) -> Iterator[Share]:
    """Every n-th shard for one of n readers: all that can be done without knowing how many samples are in them."""
    mine = islice(urls, reader.rank * reader.workers + reader.worker, None, reader.ranks * reader.workers)
    return (Share(url) for url in mine)


def sample_range(urls: Sequence[str], sizes: Sequence[int], begin: int, end: int) -> Iterator[Share]:
    """Samples `begin` to `end` (exclusive) of the shards one after the other, from the start again after the last."""
    ends = list(accumulate(sizes))
    while begin < end:
        at = begin % ends[-1]
        shard = bisect_right(ends, at)
        start = at - (ends[shard] - sizes[shard])
        stop = min(sizes[shard], start + end - begin)
        yield Share(urls[shard], start, stop, sizes[shard])
        begin += stop - start
