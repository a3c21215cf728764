"""Tar files as shards need them: written with nothing in them that varies, and read by position."""

from __future__ import annotations

import hashlib
import re
import tarfile
import zlib
from collections.abc import Iterator
from typing import IO, NamedTuple

BLOCK = 512
SUM_BYTES = 1 << 20
END = bytes(2 * BLOCK)
MEMBER_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # as webdataset splits key and extension


class Member(NamedTuple):
    """One file of a tar: its name, and where its bytes lie."""

    name: str
    offset: int
    size: int

    @property
    def key(self) -> str:
        """The sample it belongs to (webdataset: up to the first dot of the last path part)."""
        match = MEMBER_NAME.match(self.name)
        return match.group(1) if match else self.name

    @property
    def extension(self) -> str:
        """What follows the first dot, in lower case; empty if there is none."""
        match = MEMBER_NAME.match(self.name)
        return match.group(2).lower() if match else ""


class BlockSums:
    """CRC-32 of every mebibyte of what goes by, so that damage can be placed later."""

    def __init__(self) -> None:
        self.sums: list[int] = []
        self._length = 0

    def add(self, data: bytes) -> None:
        """The next bytes."""
        view = memoryview(data)
        while view:
            room = -self._length % SUM_BYTES
            if not room:
                self.sums.append(0)
                room = SUM_BYTES
            self.sums[-1] = zlib.crc32(view[:room], self.sums[-1])
            self._length += min(room, len(view))
            view = view[room:]


class TarSink:
    """Append members to a file; the bytes depend on names and contents alone (time 0, owner 0, order given)."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._sums = BlockSums()
        self.size = 0

    def add(self, name: str, data: bytes) -> None:
        """Append one member."""
        self._write(b"".join((_header(name, len(data)), data, bytes(-len(data) % BLOCK))))

    def close(self) -> str:
        """Write the end mark; returns the SHA-256 of everything written."""
        self._write(END)
        return self._hash.hexdigest()

    @property
    def sums(self) -> tuple[int, ...]:
        """`BlockSums` of everything written."""
        return tuple(self._sums.sums)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._sums.add(data)
        self.size += len(data)


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


def members(file: IO[bytes]) -> Iterator[Member]:
    """The regular files of a tar in order, with the offsets of their bytes.

    Raises:
        tarfile.ReadError: the tar is damaged or cut short.
    """
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for info in tar:
            if info.isreg():
                yield Member(info.name, info.offset_data, info.size)
            tar.members = []  # type: ignore[attr-defined]  # TarFile would keep every header


def samples(file: IO[bytes]) -> Iterator[tuple[str, list[Member]]]:
    """Neighbouring members that share a key, as webdataset groups them."""
    key, group = "", list[Member]()
    for member in members(file):
        if group and (member.key != key or any(member.extension == other.extension for other in group)):
            yield key, group
            group = []
        key = member.key
        group.append(member)
    if group:
        yield key, group
