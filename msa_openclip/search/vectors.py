"""The one reader of the .npy files of an index: mapped from disk, each row compared and checked before it is used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .checksums import CheckedFile, ChecksumError
from .files import damaged

_BLOCK = 4096


class Vectors:
    """An array of a segment; its rows are compared with their checksums, and are finite, when they are first read.

    Args:
        segment: folder of the segment.
        checked: the .npy file.
        images: rows that it must have.
    Raises:
        ImageIndexError: it is damaged, or no such array.
    """

    def __init__(self, segment: Path, checked: CheckedFile, images: int) -> None:
        self._segment, self._checked = segment, checked
        try:
            checked.check_rows(0, 1, np.arange(1))  # what NumPy is about to parse
            # Copy on write, because torch takes no read-only arrays.
            array = np.lib.format.open_memmap(checked.path, mode="c")
        except Exception as error:  # of odd headers NumPy raises what its parsers do: SyntaxError, TokenError, ...
            raise self._damaged(f"{type(error).__name__}: {error}") from error
        whole = array.offset + array.nbytes == len(checked.data) and array.flags.c_contiguous
        if array.dtype != np.float16 or array.ndim < 2 or len(array) != images or not array.size or not whole:
            raise self._damaged(f"{array.dtype} {array.shape}, expected {images} rows of float16")
        self.array: NDArray[np.float16] = array
        self._offset, self._row_bytes = int(array.offset), array.nbytes // images
        self._unseen = np.ones(images, dtype=np.bool_)

    def rows(self, rows: NDArray[np.int64]) -> NDArray[np.float16]:
        """Some rows (n, ...)."""
        self._check(rows)
        return self.array[rows]

    def block(self, start: int, stop: int) -> NDArray[np.float16]:
        """Rows from `start` to `stop`, not copied."""
        self._check(np.arange(start, stop))
        return self.array[start:stop]

    def check_all(self) -> None:
        """Check every row."""
        for start in range(0, len(self.array), _BLOCK):
            self.block(start, min(start + _BLOCK, len(self.array)))

    def _check(self, rows: NDArray[np.int64]) -> None:
        try:
            self._checked.check_rows(self._offset, self._row_bytes, rows)
        except ChecksumError as error:
            raise self._damaged(str(error).removeprefix(f"{self._checked.path.name}: ")) from error
        new = rows[self._unseen[rows]]
        if not np.isfinite(self.array[new]).all():
            raise self._damaged("numbers that are not finite")
        self._unseen[new] = False

    def _damaged(self, what: str) -> Exception:
        return damaged(self._segment, f"{self._checked.path.name}: {what}")
