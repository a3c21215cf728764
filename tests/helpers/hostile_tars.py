"""Tars made to lead a reader in circles, to fill its memory, or to end before they should."""

from __future__ import annotations

import tarfile

from .shards_data import picture_bytes


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = abs(size), kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if size < 0:
        block[124:136] = b"\xff" + (256**11 + size).to_bytes(11, "big")
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block[:512])
    return bytes(block)


def member(name: str, data: bytes) -> bytes:
    return header(name, len(data)) + data + bytes(-len(data) % 512)


def pax(**fields: str) -> bytes:
    lines = b""
    for key, value in fields.items():
        line = f" {key.replace('_', '.')}={value}\n".encode()
        length = len(line) + 2
        lines += b"%d" % (length if len(str(length)) == 2 else length + 1) + line
    return header("pax", len(lines), tarfile.XHDTYPE) + lines + bytes(-len(lines) % 512)


FIRST = member("0.jpg", picture_bytes(0)) + member("0.txt", b"a")
GOOD = FIRST + member("2.jpg", picture_bytes(2)) + member("2.txt", b"b")  # the last one before damage may be cut
HOSTILE = {  # what follows GOOD
    "negative size": header("1.jpg", -512) + bytes(512),
    "negative size of all before": header("1.jpg", -len(GOOD) - 512),
    "negative size of a folder": header("1", -512, tarfile.DIRTYPE) + header("x", -512, b"Z"),
    "negative extended size": pax(size="-1024") + header("1.jpg", 5) + bytes(512),
    "sizes that are no numbers": pax(size="1e9") + pax(GNU_sparse_size="x") + header("1.jpg", 5) + bytes(512),
    "gigabytes": header("1.jpg", 60 << 30) + bytes(60_000),
    "gigabytes of text": member("1.jpg", picture_bytes(1)) + header("1.txt", 1 << 30),
    "sparse": header("1.jpg", 1 << 30, tarfile.GNUTYPE_SPARSE) + bytes(1 << 16),
    "sparse, extended": pax(GNU_sparse_realsize=str(1 << 40), GNU_sparse_map="0,1") + header("1.jpg", 5),
    "sparse 1.0": pax(GNU_sparse_major="1", GNU_sparse_minor="0", GNU_sparse_realsize=str(1 << 40))
    + header("1.jpg", 512) + b"0\n".ljust(512, b"\0"),
    "a long name of gigabytes": header("././@LongLink", 6 << 30, tarfile.GNUTYPE_LONGNAME),
    "an extended header of gigabytes": header("pax", 6 << 30, tarfile.XHDTYPE),
    "extended headers of extended headers": pax(comment="x") * 20_000,
    "cut": header("1.jpg", 5000),
    "damaged": b"x" * 512,
    "no end": b"",
}  # fmt: skip
