"""Groups of images that are the same, by checksum, or look the same, by perceptual hash."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, pairwise

from ..imagery.prepare import open_image
from ..records import ShardError

_BITS = 64


class MissingLibrary(ShardError):
    """What compares images by their looks is not installed."""


def perceptual_hash(data: bytes) -> int:
    """64-bit DCT hash of an encoded image (imagehash's phash); look-alikes differ in few bits.

    Raises:
        MissingLibrary: imagehash is not installed; what Pillow raises for a broken image comes as it is.
    """
    try:
        import imagehash
    except ImportError as error:
        raise MissingLibrary("looking for near duplicates needs `pip install imagehash`.") from error
    with open_image(data) as image:
        return int(str(imagehash.phash(image)), 16)


def equal_groups(marks: Mapping[str, str]) -> list[list[str]]:
    """Names with the same mark (checksum), in groups of two and more."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, mark in marks.items():
        groups[mark].append(name)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


def near_groups(hashes: Mapping[str, int], max_bits: int) -> list[list[str]]:
    """Names whose hashes differ in at most `max_bits` of 64, directly or by way of others, in groups."""
    names = sorted(hashes)
    leader = {name: name for name in names}

    def find(name: str) -> str:
        while leader[name] != name:
            leader[name] = name = leader[leader[name]]
        return name

    for first, second in _close_pairs(names, hashes, max_bits):
        leader[find(second)] = find(first)
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[find(name)].append(name)
    return sorted(group for group in groups.values() if len(group) > 1)


def _close_pairs(names: Sequence[str], hashes: Mapping[str, int], max_bits: int) -> Iterator[tuple[str, str]]:
    """Pairs within `max_bits`: one of max_bits + 1 stretches of their bits must be equal, so only such are compared."""
    bands = max_bits + 1
    edges = [round(band * _BITS / bands) for band in range(bands + 1)]
    for low, high in pairwise(edges):
        buckets: dict[int, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
        for name in names:
            value = hashes[name]
            buckets[(value >> low) & ((1 << (high - low)) - 1)][value].append(name)
        for by_value in buckets.values():
            for same in by_value.values():
                yield from pairwise(same)
            for first, second in combinations(by_value, 2):
                if (first ^ second).bit_count() <= max_bits:
                    yield by_value[first][0], by_value[second][0]
