"""Nearest global features: an exact scan, or FAISS (extra `search`): IVF-PQ or HNSW candidates, re-ranked exactly."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.small_files import read_json
from ..shards.storage import store
from .checksums import CheckedFile, checksums
from .files import ImageIndexError, is_candidates_file
from .index import ImageIndex
from .options import KINDS

Nearest = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""Normalised queries (Q, E) and K -> cosines (Q, K) and rows (Q, K), best first; row -1 is none."""
LARGE = 100_000
"""From this many images on, `auto` takes IVF-PQ instead of scanning."""
_FEWEST = 16
"""Images that FAISS needs to learn codes of 4 bits; fewer are scanned, whatever is asked for."""
_TRAINING_PER_LIST = 40
_TRAINING_ROUNDS = 10  # of k-means
_log = logging.getLogger(__name__)
_MORE = 4  # candidates that FAISS gives for each that is wanted; exact cosines choose among them


def nearest(index: ImageIndex, kind: str = "auto") -> Nearest:
    """How an index finds its nearest: an exact scan, or FAISS built once and kept in the index's folder.

    A few images are scanned, whatever `kind` says: FAISS cannot learn from them.

    Raises:
        ImageIndexError: `kind` is unknown, or FAISS is missing.
    """
    if kind not in KINDS:
        raise ImageIndexError(f"nearest: {kind!r} is unknown; choose one of {', '.join(KINDS)}.")
    if kind == "auto":
        kind = "ivfpq" if len(index) >= LARGE else "flat"
    if kind == "flat" or len(index) < _FEWEST:
        return lambda queries, k: scan(index, queries, k)
    return _Approximate(index, kind)


class _Approximate:
    """FAISS candidates, then exact cosines; queries (Q, E) -> cosines and rows (Q, k)."""

    def __init__(self, index: ImageIndex, kind: str) -> None:
        self.index, self.faiss = index, _faiss()
        width = index.feature_rows(torch.arange(1)).shape[1]
        recipe = _recipe(kind, len(index), width)
        path = Path(index.folder) / f"{kind}-{_digest(index, recipe)}.faiss"
        if path.exists() and _sums(path).exists():
            self.ann = self._read(path)
        else:
            self.ann = _build(self.faiss, index, recipe, width)
            self._keep(path)

    def _read(self, path: Path) -> Any:
        try:
            CheckedFile(path, read_json(_sums(path))).check_all()
            return self.faiss.read_index(str(path))
        except (OSError, ValueError, RuntimeError) as error:
            raise ImageIndexError(f"{path}: damaged ({error}); delete it, it will be built again.") from error

    def _keep(self, path: Path) -> None:
        """Write it beside the index, for the next time; where that cannot be, it is built again each time."""
        try:
            with store.atomic_write(str(path)) as file:
                self.faiss.write_index(self.ann, self.faiss.PyCallbackIOWriter(file.write))
            store.write_text(str(_sums(path)), json.dumps(checksums(path)))
            for other in path.parent.glob(f"{path.name.partition('-')[0]}-*"):  # of fewer images
                if is_candidates_file(other.name) and other not in (path, _sums(path)):
                    store.remove(str(other))
        except (OSError, RuntimeError) as error:
            _log.warning("%s: cannot be written (%s), so it is built again each time.", path, error)

    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        wanted = min(_MORE * k, len(self.index))
        _, found = self.ann.search(queries.float().numpy(), wanted)
        values, rows = torch.full((len(queries), k), -torch.inf), torch.full((len(queries), k), -1, dtype=torch.long)
        for number, row in enumerate(torch.from_numpy(found)):
            row = row[row >= 0]  # fewer than wanted may be found
            best = (self.index.feature_rows(row) @ queries[number].float()).topk(min(k, len(row)))
            values[number, : len(best.values)], rows[number, : len(best.values)] = best.values, row[best.indices]
        return values, rows


def scan(index: ImageIndex, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest rows of each query (Q, E) by exact cosine: values and rows (Q, k), best first."""
    values, rows = queries.new_empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long)
    for first, features in index.features():
        cosine = queries @ features.T
        values = torch.cat([values, cosine], dim=1)
        rows = torch.cat([rows, torch.arange(first, first + len(features)).expand(len(queries), -1)], dim=1)
        values, best = values.topk(min(k, values.shape[1]), dim=1)
        rows = rows.gather(1, best)
    return values, rows


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImageIndexError("FAISS is missing: pip install 'msa_openclip[search]', or use nearest 'flat'.") from error
    return faiss


def _sums(path: Path) -> Path:
    """Where the checksums of a file of FAISS are."""
    return path.with_suffix(".faiss.json")


def _digest(index: ImageIndex, recipe: str) -> str:
    """Changes whenever images are added."""
    names = " ".join([recipe, *(segment.name for segment in index.segments)])
    return hashlib.sha256(names.encode()).hexdigest()[:12]


def _recipe(kind: str, count: int, width: int) -> str:
    """What FAISS's `index_factory` makes for so many vectors."""
    if kind == "hnsw":
        return "HNSW32,SQfp16"
    lists = max(1, min(round(2 * math.sqrt(count)), count // _TRAINING_PER_LIST))
    # 2 values in 4 bits: FAISS learns such codes in seconds, 8-bit ones in minutes, and scans them in registers.
    # With 4 values, of a million images one in twenty of the top 10 was lost (docs/results/search.md, engines).
    parts = next(parts for parts in range(max(1, width // 2), 0, -1) if width % parts == 0)
    return f"IVF{lists},PQ{parts}x4fs"


def _build(faiss: Any, index: ImageIndex, recipe: str, width: int) -> Any:
    count = len(index)
    ann = faiss.index_factory(width, recipe, faiss.METRIC_INNER_PRODUCT)
    if recipe.startswith("HNSW"):
        ann.hnsw.efSearch = 512
        training_rows = min(count, 10_000)
    else:
        ann.nprobe = max(1, ann.nlist // 8)
        ann.cp.niter = ann.pq.cp.niter = _TRAINING_ROUNDS
        training_rows = min(count, _TRAINING_PER_LIST * max(ann.nlist, 16))
    generator = torch.Generator().manual_seed(0)
    sample = torch.randperm(count, generator=generator)[:training_rows].sort().values
    ann.train(index.feature_rows(sample).numpy())
    for _, features in index.features():
        ann.add(features.numpy())
    return ann
