"""An index, opened: vectors mapped from disk, records parsed when they are asked for.

Shapes: n rows, S scales, D width of MSCMAT, E embed_dim.
"""

from __future__ import annotations

import bisect
import json
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.captioned import CaptionedImage
from ..evaluation.loading import LoadedModel
from .files import damaged, from_record, read_manifest
from .fingerprint import check_model

_BLOCK = 2048


class ImageRecords(Sequence[CaptionedImage]):
    """The records of all segments as a sequence; a row is parsed when it is asked for."""

    def __init__(self) -> None:
        self._parts: list[tuple[bytes | mmap.mmap, NDArray[np.int64]]] = []
        self._ends: list[int] = []

    def append(self, segment: Path, images: int) -> None:
        """Add the records of a segment.

        Raises:
            ImageIndexError: there are not as many as images.
        """
        path = segment / "records.jsonl"
        try:
            with open(path, "rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise damaged(segment, f"{path.name}: {error}") from error
        ends = np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == ord("\n"))
        if len(ends) != images:
            raise damaged(segment, f"{path.name}: {len(ends)} lines, expected {images}")
        self._parts.append((data, np.concatenate([[-1], ends])))
        self._ends.append(len(self) + images)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, row: int) -> CaptionedImage: ...
    @overload
    def __getitem__(self, row: slice) -> list[CaptionedImage]: ...
    def __getitem__(self, row: int | slice) -> CaptionedImage | list[CaptionedImage]:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        if not 0 <= row < len(self):
            raise IndexError(row)  # ends iteration
        number = bisect.bisect_right(self._ends, row)
        data, ends = self._parts[number]
        place = row - (self._ends[number - 1] if number else 0)
        return from_record(json.loads(data[ends[place] + 1 : ends[place + 1]]))


class ImageIndex:
    """An index, opened: rows in the order of its segments, vectors mapped from disk.

    Args:
        folder: what `build_index` made.
        model: the model that built it.
    Raises:
        ImageIndexError: there is no index, it is damaged, or another model built it.
    """

    def __init__(self, folder: str, model: LoadedModel) -> None:
        root = Path(folder)
        manifest = read_manifest(root)
        check_model(root, manifest, model)
        self.folder, self.model = folder, model
        self.segments = manifest.segments
        self.images = ImageRecords()
        """What is known of every image, read from disk when asked for."""
        self.filter_fields: list[NDArray[np.void]] = []
        """Of each segment what filters look at: (n,) with `label`, `date`, `bounds` (west, south, east, north)."""
        self._features: list[NDArray[np.float16]] = []
        self._projected: list[NDArray[np.float16]] = []
        for segment in self.segments:
            path = root / segment.name
            self.images.append(path, segment.images)
            self.filter_fields.append(_mapped(path, "facts.npy", segment.images))
            self._features.append(_mapped(path, "features.npy", segment.images))
            if model.scorer.has_match:
                self._projected.append(_mapped(path, "projected.npy", segment.images))
        self._ends = np.cumsum([len(part) for part in self._features])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def features(self) -> Iterator[tuple[int, Tensor]]:
        """First row and global features (n, E) float32, a few thousand rows at a time, which stay in fast memory."""
        for end, part in zip(self._ends, self._features, strict=True):
            for start in range(0, len(part), _BLOCK):
                yield int(end) - len(part) + start, torch.from_numpy(part[start : start + _BLOCK]).float()

    def feature_rows(self, rows: Tensor) -> Tensor:
        """Global features (n, E) float32 of some rows."""
        return self._rows(self._features, rows)

    def projected_rows(self, rows: Tensor) -> Tensor | None:
        """MSCMAT's vectors m (n, S, D) float32 of some rows."""
        return self._rows(self._projected, rows) if self._projected else None

    def _rows(self, parts: Sequence[NDArray[np.float16]], rows: Tensor) -> Tensor:
        wanted = rows.cpu().numpy()
        segment = np.searchsorted(self._ends, wanted, side="right")
        result = np.empty((len(wanted), *parts[0].shape[1:]), dtype=np.float16)
        for number in np.unique(segment):
            here = segment == number
            result[here] = parts[number][wanted[here] - (self._ends[number] - len(parts[number]))]
        return torch.from_numpy(result).float()


def _mapped(segment: Path, file: str, images: int) -> NDArray[Any]:
    try:
        values: NDArray[Any] = np.load(segment / file, mmap_mode="c")  # torch takes no read-only arrays
    except (OSError, ValueError) as error:
        raise damaged(segment, f"{file}: {error}") from error
    if len(values) != images:
        raise damaged(segment, f"{file}: {len(values)} rows, expected {images}")
    return values
