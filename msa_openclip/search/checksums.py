"""Checksums of files that are too large to be read whole: one for each part, compared when the part is first read."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..data.small_files import require_regular

PART_BYTES = 1 << 18


class ChecksumError(ValueError):
    """A file is not what was written."""


def checksums(path: Path) -> dict[str, Any]:
    """Size of a file, and CRC-32 of each of its parts of PART_BYTES, as plain data."""
    with open(path, "rb") as file:
        sums = [zlib.crc32(part) for part in iter(lambda: file.read(PART_BYTES), b"")]
    return {"bytes": os.path.getsize(path), "crc32": sums}


class CheckedFile:
    """A file, mapped, that is compared with its checksums part by part, each once, before it is used.

    Args:
        path: the file.
        expected: what `checksums` said when it was written.
    Raises:
        ChecksumError: it is gone, no regular file, or of another size; or `expected` is no description of a file.
    """

    def __init__(self, path: Path, expected: Any) -> None:
        self.path = path
        try:
            size = require_regular(path).st_size
            self._size, sums = int(expected["bytes"]), expected["crc32"]
            self._sums = np.array(sums, dtype=np.uint32)
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise ChecksumError(f"{path.name}: {error}") from error
        if size != self._size or len(self._sums) != -(-size // PART_BYTES):
            raise ChecksumError(f"{path.name}: {size:,} bytes, expected {self._size:,}")
        self.data = np.memmap(path, dtype=np.uint8, mode="r") if size else np.empty(0, dtype=np.uint8)
        self._unseen = np.ones(len(self._sums), dtype=np.bool_)

    def check_all(self) -> None:
        """Compare the whole file."""
        self._check(np.flatnonzero(self._unseen).tolist())

    def check_rows(self, offset: int, row_bytes: int, rows: Any) -> None:
        """Compare what holds some rows of an array, NumPy's own header included.

        Args:
            offset: bytes before the first row.
            row_bytes: bytes of a row.
            rows: numbers (n,) of the rows.
        """
        first = (offset + rows.astype(np.int64) * row_bytes) // PART_BYTES
        last = (offset + (rows.astype(np.int64) + 1) * row_bytes - 1) // PART_BYTES
        span = int((last - first).max(initial=0))
        parts = np.unique(np.concatenate([[0], *(np.minimum(first + step, last) for step in range(span + 1))]))
        self._check(parts[self._unseen[parts]].tolist())

    def _check(self, parts: Iterable[int]) -> None:
        for part in parts:
            start = part * PART_BYTES
            if zlib.crc32(self.data[start : start + PART_BYTES].data) != self._sums[part]:
                raise ChecksumError(
                    f"{self.path.name}: bytes {start:,} to {start + PART_BYTES:,} are not what was written"
                )
            self._unseen[part] = False
