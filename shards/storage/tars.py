"""Tar files as shards need them: written with nothing in them that varies, and read by position."""

from __future__ import annotations

import hashlib
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from gzip import BadGzipFile
from typing import IO, Any, NamedTuple, TypeVar

from ..options import PILLOW_BOMB_LIMIT

BLOCK = 512
SUM_BYTES = 1 << 20
END = bytes(2 * BLOCK)
_BEFORE_SIZE = b"0000644\0" + b"0000000\0" * 2  # mode, owner, group
_AFTER_SIZE = b"\0" + b"0" * 11 + b"\0"  # time
_CHECKSUM_END = b"\0 "
_REST = b"0" + bytes(100) + b"ustar\00000" + bytes(247)  # a file, no link, no names
_FIXED_SUM = sum(_BEFORE_SIZE) + sum(_AFTER_SIZE) + 8 * ord(" ") + sum(_REST)  # the checksum itself counts as spaces
MOST_IMAGE_BYTES = 4 * PILLOW_BOMB_LIMIT
"""As much as four bytes for each pixel of the largest image that Pillow opens."""
MOST_TEXT_BYTES = 64 << 20
"""Of the captions or the JSON of one sample."""
IMAGE_MEMBERS = ("jpg", "png", "jpeg", "webp")
"""Extensions of the images that open_clip reads from shards; of several in a sample the first counts, as there."""
DATED_MEMBER = re.compile(rf"(\d{{1,4}})\.(?:{'|'.join(IMAGE_MEMBERS)})")
"""What stands behind the key in KEY.0.jpg."""
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


def image_of(parts: Mapping[str, Part], date: int | None = None) -> Part | None:
    """The image among the parts of a sample by extension, KEY.jpg or of a date, KEY.0.jpg; None if there is none."""
    names = IMAGE_MEMBERS if date is None else [f"{date}.{name}" for name in IMAGE_MEMBERS]
    return next((parts[name] for name in names if name in parts), None)


def images_of(parts: Mapping[str, Part]) -> list[Part]:
    """KEY.jpg of a sample, or KEY.0.jpg, KEY.1.jpg, ... up to the first date that has none; empty without either."""
    image = image_of(parts)
    if image is not None:
        return [image]
    found: list[Part] = []
    while (image := image_of(parts, len(found))) is not None:
        found.append(image)
    return found


def missing_date(names: Iterable[str]) -> int | None:
    """The date of which a sample has no image though it has one of a later date; None as a rule.

    `images_of` stops there, so that the later ones would go by in silence.
    """
    names = set(names)
    if not names.isdisjoint(IMAGE_MEMBERS):
        return None
    there = {int(match[1]) for name in names if (match := DATED_MEMBER.fullmatch(name))}
    return next((date for date in range(max(there, default=0)) if date not in there), None)


def read_member(file: IO[bytes], member: Member) -> bytes:
    """The bytes of a member; restores the position of the file.

    Raises:
        tarfile.ReadError: it is larger than MOST_IMAGE_BYTES, for other than images MOST_TEXT_BYTES, or cut short.
    """
    require_readable(member.name, member.size)
    position = file.tell()
    file.seek(member.offset)
    data = file.read(member.size)
    file.seek(position)
    if len(data) != member.size:
        raise tarfile.ReadError(f"{member.name}: ends after {len(data):,} of {member.size:,} bytes")
    return data


def require_readable(name: str, size: int) -> None:
    """Refuse a member that is larger than what it can be; a tar of a few kilobytes may claim any size.

    Raises:
        tarfile.ReadError: it is.
    """
    most = MOST_TEXT_BYTES if name.lower().endswith((".txt", ".json", ".caption")) else MOST_IMAGE_BYTES
    if size > most:
        raise tarfile.ReadError(f"{name}: {size:,} bytes, more than the {most:,} that are read in one piece")


class BlockSums:
    """CRC-32 of every mebibyte added, so that damage can be located later."""

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


class _StrictTarInfo(tarfile.TarInfo):
    """A header that is refused if it is damaged or would lead the reader astray.

    tarfile takes a damaged header, and the end of the file, for the end of the archive, and believes every size: a
    negative one leads back to where it has been, and what a long name or sparse file claims is read into memory.
    """

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Any:
        """The next header."""
        try:
            return super().fromtarfile(tar)
        except _DAMAGES as error:
            raise tarfile.ReadError(f"{error} at byte {tar.offset:,}") from error

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Any:
        """A header from its block, before tarfile follows it."""
        info = super().frombuf(buf, encoding, errors)
        _require_sane(info)
        if info.type in _EXTENDED and info.size > _MOST_EXTENDED:
            raise tarfile.ReadError(f"{info.name!r}: a name or header of {info.size:,} bytes")
        return info


_DAMAGES = (
    tarfile.InvalidHeaderError,  # type: ignore[attr-defined]
    tarfile.EmptyHeaderError,  # type: ignore[attr-defined]
    tarfile.TruncatedHeaderError,  # type: ignore[attr-defined]
)
_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
             tarfile.GNUTYPE_LONGLINK)  # fmt: skip
_MOST_EXTENDED = 1 << 20


def _require_sane(info: tarfile.TarInfo) -> None:
    if info.size < 0:
        raise tarfile.ReadError(f"{info.name!r}: a size of {info.size} bytes")
    if info.issparse() or info.type == tarfile.GNUTYPE_SPARSE:
        raise tarfile.ReadError(f"{info.name!r}: stored sparse; make the tar again without --sparse")


def open_tar(file: IO[bytes], mode: str = "r:", bufsize: int = 10240) -> tarfile.TarFile:
    """A tar for `headers`; with mode "r|*" one that is read forwards, compressed or not.

    Raises:
        tarfile.ReadError: it is none.
    """
    opened: Any = tarfile.open
    with _as_read_error("the first header"):
        tar: tarfile.TarFile = opened(fileobj=file, mode=mode, bufsize=bufsize, tarinfo=_StrictTarInfo)
    return tar


def headers(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar in order, none of them kept.

    Raises:
        tarfile.ReadError: the tar is damaged or cut short, or a header claims a size that cannot be.
    """
    while True:
        with _as_read_error(f"the header at byte {tar.offset:,}"):
            info = tar.next()
        if info is None:
            return
        _require_sane(info)  # extended headers may have changed it
        tar.members = []  # type: ignore[attr-defined]  # TarFile would keep every header
        yield info


def content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    """The bytes of the member of a header that `headers` has just given.

    Raises:
        tarfile.ReadError: it is larger than a member may be, cut short, or badly compressed.
    """
    require_readable(info.name, info.size)
    with _as_read_error(info.name):
        file = tar.extractfile(info)
        return file.read() if file else b""


@contextmanager
def _as_read_error(what: str) -> Iterator[None]:
    """tarfile lets through what int(), decoders and decompressors raise for damaged headers, and its own recursion."""
    try:
        yield
    except (ValueError, OverflowError, RecursionError, EOFError, BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise tarfile.ReadError(f"{what} is damaged ({type(error).__name__}: {error})") from error


def members(file: IO[bytes]) -> Iterator[Member]:
    """The regular files of a tar in order, with the offsets of their bytes.

    Raises:
        tarfile.ReadError: the tar is damaged or cut short, or a header claims a size that cannot be.
    """
    with open_tar(file) as tar:
        for info in headers(tar):
            if info.isreg():
                yield Member(info.name, info.offset_data, info.size)
        # TarFile takes the end of the file for the end of the archive.
        file.seek(tar.offset)
        if file.read(BLOCK) != bytes(BLOCK):
            raise tarfile.ReadError(f"neither a member nor the end mark at byte {tar.offset:,}")


def samples(file: IO[bytes]) -> Iterator[tuple[str, list[Member]]]:
    """Neighbouring members that share a key, as webdataset groups them."""
    key, group = "", dict[str, Member]()
    for member in members(file):
        if group and (member.key != key or member.extension in group):
            yield key, list(group.values())
            group = {}
        key = member.key
        group[member.extension] = member
    if group:
        yield key, list(group.values())
