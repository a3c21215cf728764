"""Tar files as shards need them: written with nothing in them that varies, and read by position."""

from __future__ import annotations

import hashlib
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from typing import IO, NamedTuple, TypeVar

BLOCK = 512
SUM_BYTES = 1 << 20
END = bytes(2 * BLOCK)
_BEFORE_SIZE = b"0000644\0" + b"0000000\0" * 2  # mode, owner, group
_AFTER_SIZE = b"\0" + b"0" * 11 + b"\0"  # time
_CHECKSUM_END = b"\0 "
_REST = b"0" + bytes(100) + b"ustar\00000" + bytes(247)  # a file, no link, no names
_FIXED_SUM = sum(_BEFORE_SIZE) + sum(_AFTER_SIZE) + 8 * ord(" ") + sum(_REST)  # the checksum itself counts as spaces
IMAGE_MEMBERS = ("jpg", "png", "jpeg", "webp")
"""Extensions of the images that open_clip reads from shards; of several in a sample the first counts, as there."""
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


Part = TypeVar("Part")


def image_of(parts: Mapping[str, Part]) -> Part | None:
    """The image among the parts of a sample by extension; None if there is none."""
    return next((parts[name] for name in IMAGE_MEMBERS if name in parts), None)


def read_member(file: IO[bytes], member: Member) -> bytes:
    """The bytes of a member; the file stays where it was, for who reads on."""
    position = file.tell()
    file.seek(member.offset)
    data = file.read(member.size)
    file.seek(position)
    return data


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
    """The ustar header of a file of mode 644, owner 0, time 0: as tarfile writes it, several times as fast."""
    encoded, octal = name.encode("ascii"), b"%011o" % size
    assert len(encoded) <= 100 and len(octal) == 11, name  # noqa: PT018 -- keys are kept short; ustar ends at 8 GiB
    checksum = b"%06o" % (sum(encoded) + sum(octal) + _FIXED_SUM)
    return b"".join((encoded.ljust(100, b"\0"), _BEFORE_SIZE, octal, _AFTER_SIZE, checksum, _CHECKSUM_END, _REST))


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
        # TarFile takes a header that it cannot read, and the end of the file, for the end of the archive.
        file.seek(tar.offset)
        if file.read(BLOCK) != bytes(BLOCK):
            raise tarfile.ReadError(f"neither a member nor the end mark at byte {tar.offset:,}")


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
