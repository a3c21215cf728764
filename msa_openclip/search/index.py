"""An opened index: vectors memory-mapped, metadata decoded on access.

Shapes: n rows, S scales, D width of MSCMAT, E embed_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..evaluation.loading import LoadedModel
from .files import TILES, ImageIndexError, checked_files, damaged, read_manifest, segment_extent
from .fingerprint import check_model
from .tiles import Tiles
from .vectors import Vectors

_BLOCK = 2048


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
        self.images = Tiles()
        """What is known of every image, read from disk when asked for."""
        self._features: list[Vectors] = []
        self._projected: list[Vectors] = []
        for segment in manifest.segments:
            path, files = root / segment.name, checked_files(root, segment)
            if not segment.images:  # none of its images could be read
                continue
            self.images.append(path, files[TILES], segment.images, segment_extent(root, segment))
            self._features.append(Vectors(path, files["features.npy"], segment.images))
            if model.scorer.has_match:
                if "projected.npy" not in files:
                    raise damaged(path, "projected.npy: not found")
                self._projected.append(Vectors(path, files["projected.npy"], segment.images))
        if self._features:
            self.check_shape("features.npy", self._features[0].array.shape[1:])
        if self._projected:
            self.check_shape("projected.npy", model.scorer.match_shape)
        self._ends = np.cumsum([len(part.array) for part in self._features])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        """Raise ImageIndexError unless all rows of the vectors `features.npy` or `projected.npy` have this shape."""
        for part in self._projected if name == "projected.npy" else self._features:
            if part.array.shape[1:] != expected:
                raise ImageIndexError(
                    f"{self.folder}: {name} holds vectors of {part.array.shape[1:]} numbers, expected {expected}; "
                    "build the index again."
                )

    def features(self) -> Iterator[tuple[int, Tensor]]:
        """First row and global features (n, E) float32, a few thousand rows at a time, which stay in fast memory."""
        for end, part in zip(self._ends, self._features, strict=True):
            count = len(part.array)
            for start in range(0, count, _BLOCK):
                block = part.block(start, min(start + _BLOCK, count))
                yield int(end) - count + start, torch.from_numpy(block).float()

    def feature_rows(self, rows: Tensor) -> Tensor:
        """Global features (n, E) float32 of some rows."""
        return self._rows(self._features, rows)

    def projected_rows(self, rows: Tensor) -> Tensor | None:
        """MSCMAT's vectors m (n, S, D) float32 of some rows."""
        return self._rows(self._projected, rows) if self._projected else None

    def _rows(self, parts: Sequence[Vectors], rows: Tensor) -> Tensor:
        wanted = rows.cpu().numpy()
        segment = np.searchsorted(self._ends, wanted, side="right")
        result = np.empty((len(wanted), *parts[0].array.shape[1:]), dtype=np.float16)
        for number in np.unique(segment):
            here = segment == number
            result[here] = parts[number].rows(wanted[here] - (self._ends[number] - len(parts[number].array)))
        return torch.from_numpy(result).float()
