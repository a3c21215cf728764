"""Read every shard again and hold it to the manifest; say what is wrong, where, and down to which byte."""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any, NamedTuple

from tqdm import tqdm

from .. import manifest
from ..imagery.prepare import open_image
from ..output import printable
from ..readers.tar_files import read_metadata
from ..records import ShardError
from ..running import engines, stopping
from ..storage import json_text, store
from ..storage.tars import SUM_BYTES, BlockSums, images_of, members, read_member, samples

_CRC_TABLE = [zlib.crc32(bytes([0, byte])) ^ zlib.crc32(bytes([0, 0])) for byte in range(256)]
_BY_TOP_BYTE = {value >> 24: index for index, value in enumerate(_CRC_TABLE)}


class Problem(NamedTuple):
    """One thing that is wrong."""

    file: str
    what: str


@dataclass(frozen=True)
class Verification:
    """The outcome; `ok` if nothing is wrong."""

    folder: str
    shards: int
    samples: int
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return not self.problems

    def text(self) -> str:
        """For people."""
        if self.ok:
            return f"{self.folder}: {self.shards} shards with {self.samples:,} samples are as the manifest says."
        lines = [printable(f"  {problem.file}: {problem.what}") for problem in self.problems]
        return "\n".join([f"{self.folder}: {len(lines)} problems", *lines])


def verify(folder: str, *, decode: bool = False, workers: int = 1, progress: bool = False) -> Verification:
    """Hold a folder of shards to its manifest.

    Args:
        decode: also decode every image and compare it with the checksum in its sample's JSON.
    Raises:
        ShardError: there is no manifest to hold it to.
    """
    content = manifest.read(folder)
    rows = content["shards"]
    problems = list(_check_neighbours(folder, rows))
    check = partial(_check_shard, folder, decode, content.get("dates", 1))
    in_memory = folder.startswith("memory://")
    found = engines.run(check, iter(rows), "auto", workers, in_memory=in_memory)
    for result in tqdm(found, total=len(rows), unit=" shards", desc="verifying", disable=not progress):
        problems += result
    samples_total = sum(row["samples"] for row in rows)
    return Verification(folder, len(rows), samples_total, sorted(problems))


def _check_neighbours(folder: str, rows: list[dict[str, Any]]) -> Iterator[Problem]:
    """sizes.json says the same, and no shard lies about that a brace pattern could take in."""
    names = {row["file"] for row in rows}
    try:
        sizes = json_text.parse(store.read_bytes(store.join(folder, "sizes.json")), "sizes.json")
        if not isinstance(sizes, dict):
            raise ShardError("not a JSON object")
    except (FileNotFoundError, ShardError) as error:
        yield Problem(
            "sizes.json", f"missing or unreadable ({error}); open_clip needs it to know the number of samples"
        )
    else:
        for row in rows:
            if sizes.get(row["file"]) != row["samples"]:
                yield Problem("sizes.json", f"{row['file']}: {sizes.get(row['file'])}, expected {row['samples']}")
    for name in store.names(folder):
        if name.endswith(".tar") and name not in names:
            yield Problem(name, "is not in the manifest; a leftover of another build?")


def _check_shard(folder: str, decode: bool, dates: int, row: dict[str, Any]) -> list[Problem]:
    url, name = store.join(folder, row["file"]), row["file"]
    if not store.exists(url):
        return [Problem(name, "missing")]
    digest, sums, length = hashlib.sha256(), BlockSums(), 0
    with store.open_read(url) as file:
        while data := file.read(SUM_BYTES):
            stopping.check()
            digest.update(data)
            sums.add(data[: max(0, row["size_bytes"] - length)])
            length += len(data)
        if digest.hexdigest() != row["sha256"]:
            expected = [int(crc, 16) for crc in row["sums"].split()]
            return [Problem(name, _describe_damage(file, row, expected, sums.sums, length))]
        try:
            return list(_decode_all(file, name, dates)) if decode else []
        except tarfile.TarError as error:  # as built: its checksum is right
            return [Problem(name, f"not a tar that can be read: {error}")]


def _describe_damage(file: IO[bytes], row: dict[str, Any], expected: list[int], found: list[int], length: int) -> str:
    whole = length // SUM_BYTES if length < row["size_bytes"] else len(expected)
    bad = next((index for index in range(min(whole, len(found))) if expected[index] != found[index]), None)
    if bad is None:
        if length < row["size_bytes"]:
            return f"cut short: ends at byte {length:,} of {row['size_bytes']:,}{_member_at(file, length)}"
        return f"{length - row['size_bytes']:,} bytes too many, from byte {row['size_bytes']:,} on"
    start = bad * SUM_BYTES
    file.seek(start)
    block = file.read(SUM_BYTES)
    for position, change in _single_byte_changes(expected[bad] ^ found[bad], len(block)):
        at = start + position
        if _sha256_with(file, at, block[position] ^ change) == row["sha256"]:
            return (
                f"byte {at:,} is {block[position]:#04x} and should be {block[position] ^ change:#04x}"
                f"{_member_at(file, at)}"
            )
    end = start + len(block) - 1
    return f"the first bad byte lies within bytes {start:,} to {end:,}{_member_at(file, start)}"


def _single_byte_changes(difference: int, length: int) -> Iterator[tuple[int, int]]:
    """Where in a block, and by which XOR, one changed byte would explain the difference of two CRC-32.

    A CRC is linear: a change d at position p adds table[d] shifted through the bytes behind p.  Undoing that shift one
    byte at a time from the end of the block must come upon a table entry at p.
    """
    changes = {value: byte for byte, value in enumerate(_CRC_TABLE) if byte}
    for position in range(length - 1, -1, -1):
        if difference in changes:
            yield position, changes[difference]
        index = _BY_TOP_BYTE[difference >> 24]
        difference = ((difference ^ _CRC_TABLE[index]) << 8 & 0xFFFFFFFF) | index


def _sha256_with(file: IO[bytes], position: int, byte: int) -> str:
    """SHA-256 of the file if one byte of it were another."""
    digest, at = hashlib.sha256(), 0
    file.seek(0)
    while data := file.read(SUM_BYTES):
        if at <= position < at + len(data):
            data = data[: position - at] + bytes([byte]) + data[position - at + 1 :]
        digest.update(data)
        at += len(data)
    return digest.hexdigest()


def _member_at(file: IO[bytes], position: int) -> str:
    """Which member holds a byte, as far as the tar can still be read."""
    file.seek(0)
    last = ""
    try:
        for member in members(file):
            last = member.name
            if position < member.offset + member.size:
                return f", in {member.name}" if position >= member.offset else f", in the header of {member.name}"
    except tarfile.TarError:
        pass
    return f", behind {last}" if last else ""


def _decode_all(file: IO[bytes], name: str, dates: int) -> Iterator[Problem]:
    """Decode the images of every sample, one of each date; compare them with the checksum beside them."""
    file.seek(0)
    groups = list(samples(file))
    for key, group in groups:
        stopping.check()
        parts = {member.extension: member for member in group}
        images = images_of(parts)
        if len(images) != dates or not {"txt", "json"} <= set(parts):
            expected = "an image" if dates == 1 else f"images of {dates} dates"
            yield Problem(name, f"sample {key} has {', '.join(parts)}; expected {expected}, txt and json")
            continue
        contents = [read_member(file, image) for image in images]
        try:
            metadata = read_metadata(file, parts["json"])
        except ShardError as error:
            yield Problem(name, str(error))
            continue
        if hashlib.sha256(b"".join(contents)).hexdigest() != metadata.get("sha256"):
            found = " and ".join(image.name for image in images)
            are = "is not the image" if dates == 1 else "are not the images"
            yield Problem(name, f"{found} {are} its JSON describes (sha256)")
        for image, data in zip(images, contents, strict=True):
            try:
                with open_image(data) as picture:
                    picture.load()
            except Exception as error:  # Pillow raises nearly everything for one broken file or another
                yield Problem(name, f"{image.name} cannot be decoded: {error}")
