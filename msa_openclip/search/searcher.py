"""Search an index: the K nearest by global features, then MSCMAT's exact scores on those, in fused order.

    searcher = Searcher(ImageIndex("index", model))
    for hit in searcher.by_text(["many planes are parked beside a terminal"])[0]:
        print(hit.score, hit.image.image_id)

Shapes: Q queries, K candidates, T texts, S scales, E embed_dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.captioned import CaptionedImage
from ..data.pixels import dates_of, preprocessed
from ..evaluation.scorer import EncodedImages, EncodedTexts
from .filters import SearchError, SearchFilter
from .index import ImageIndex
from .nearest import Nearest, scan
from .options import CANDIDATES

_BLOCK = 2048
Picture: TypeAlias = Image.Image | Sequence[Image.Image]
"""A picture; for a model of several dates those of one place, in order of date."""


@dataclass(frozen=True)
class Hit:
    """One answer."""

    score: float
    """The score that orders the hits: fused, or the cosine in image-to-image search."""
    cosine: float
    match: tuple[float, ...]
    """MSCMAT's score of each scale, shallow to deep; empty without MSCMAT and between images."""
    image: CaptionedImage | None = None
    row: int | None = None
    """Of the image in the index."""
    text: str | None = None


class Searcher:
    """Answers queries from an index.

        searcher = Searcher(ImageIndex("tiles.index", model))
        hits = searcher.by_text(["many planes beside a terminal"], k=5)[0]

    Args:
        index: the opened index.
        candidates: K.
        nearest: finds the nearest by global features; by default an exact scan of the index.
    """

    def __init__(self, index: ImageIndex, *, candidates: int = CANDIDATES, nearest: Nearest | None = None) -> None:
        if candidates < 1:
            raise SearchError(f"candidates: {candidates} must be at least 1.")
        self.index, self.scorer, self.candidates = index, index.model.scorer, candidates
        self._nearest = nearest
        self._texts: tuple[tuple[str, ...], Tensor] | None = None

    def by_text(self, queries: Sequence[str], k: int = 10, where: SearchFilter | None = None) -> list[list[Hit]]:
        """The k best images for each of many texts, in fused order.

        Raises:
            SearchError: a query is blank, or k is not positive.
        """
        for number, query in enumerate(queries):
            if not query.strip():
                raise SearchError(f"query {number} is blank; write what to look for.")
        texts = self._encode(queries) if queries else None
        if texts is None or self._is_empty(k):
            return [[] for _ in queries]
        _, rows = self._find(texts.feature.cpu(), max(self.candidates, k), where)
        return [self._fused_images(_text(texts, q), rows[q][rows[q] >= 0], k) for q in range(len(queries))]

    def by_image(self, queries: Sequence[Picture], k: int = 10, where: SearchFilter | None = None) -> list[list[Hit]]:
        """The k images most like each picture, by global features; MSCMAT knows pairs of image and text only."""
        if not queries or self._is_empty(k):
            return [[] for _ in queries]
        feature, _ = self._project(queries)
        cosine, rows = self._find(feature.cpu(), k, where)
        return [
            [Hit(float(c), float(c), (), self.index.images[r], r) for c, r in zip(*pair, strict=True) if r >= 0]
            for pair in zip(cosine.tolist(), rows.tolist(), strict=True)
        ]

    def texts_of(self, queries: Sequence[Picture], k: int = 10, texts: Sequence[str] | None = None) -> list[list[Hit]]:
        """The k best texts for each picture, in fused order; by default among all captions of the index."""
        names, features = self._captions() if texts is None else (tuple(texts), None)
        if not queries or not names:
            return [[] for _ in queries]
        features = self._text_features(names) if features is None else features
        feature, projected = self._project(queries)
        encoded = self.scorer.fold(feature, projected)
        nearest = (feature.cpu() @ features.T).topk(min(max(self.candidates, k), len(names)), dim=1).indices
        candidates = [[names[place] for place in row] for row in nearest.tolist()]
        return [self._fused_texts(_image(encoded, q), some, k) for q, some in enumerate(candidates)]

    def _project(self, queries: Sequence[Picture]) -> tuple[Tensor, Tensor | None]:
        preprocess = self.index.model.preprocess
        return self.scorer.project(torch.stack([preprocessed(dates_of(query), preprocess) for query in queries]))

    def _encode(self, texts: Sequence[str]) -> EncodedTexts:
        return self.scorer.texts(self.index.model.tokenizer(list(texts)))

    def _is_empty(self, k: int) -> bool:
        if k < 1:
            raise SearchError(f"k: {k} must be at least 1.")
        return len(self.index) == 0

    def _find(self, queries: Tensor, k: int, where: SearchFilter | None) -> tuple[Tensor, Tensor]:
        """Cosines and rows of the k nearest (Q, k), among the allowed ones."""
        self.index.check_shape("features.npy", tuple(queries.shape[1:]))
        if where is not None:
            return self._scan_rows(queries, k, self._rows_where(where))
        if self._nearest is not None:
            return self._nearest(queries, k)
        return scan(self.index, queries, k)

    def _rows_where(self, where: SearchFilter) -> Tensor:
        """The rows of the images that may be found."""
        return torch.from_numpy(np.flatnonzero(where(self.index.images)))

    def _scan_rows(self, queries: Tensor, k: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """As `scan`, of some rows."""
        blocks = [rows[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK)]
        cosines = [queries @ self.index.feature_rows(block).T for block in blocks]
        best = torch.cat([queries[:, :0], *cosines], dim=1).topk(min(k, len(rows)), dim=1)
        return best.values, rows[best.indices]

    def _fused_images(self, text: EncodedTexts, rows: Tensor, k: int) -> list[Hit]:
        """Exact scores of one text with the candidates, best first."""
        if not len(rows):
            return []
        feature, projected = self.index.feature_rows(rows), self.index.projected_rows(rows)
        images = self.scorer.fold(feature.to(self.scorer.device), projected)
        scores = self.scorer.scores(images, text)[:, :, 0].cpu()  # (R, K)
        order = self._order(scores, k)
        found = [(place, int(rows[place])) for place in order]
        return [self._hit(scores[:, place], image=self.index.images[row], row=row) for place, row in found]

    def _fused_texts(self, image: EncodedImages, texts: Sequence[str], k: int) -> list[Hit]:
        scores = self.scorer.scores(image, self._encode(texts))[:, 0].cpu()  # (R, K)
        return [self._hit(scores[:, place], text=texts[place]) for place in self._order(scores, k)]

    def _order(self, scores: Tensor, k: int) -> list[int]:
        main = scores[self.scorer.rankings.index(self.scorer.main_ranking)]
        order: list[int] = main.argsort(descending=True, stable=True)[:k].tolist()
        return order

    def _hit(self, scores: Tensor, **answer: Any) -> Hit:
        by_ranking: Mapping[str, float] = dict(zip(self.scorer.rankings, scores.tolist(), strict=True))
        match = tuple(value for name, value in by_ranking.items() if name.startswith("match_scale"))
        return Hit(by_ranking[self.scorer.main_ranking], by_ranking["global"], match, **answer)

    def _captions(self) -> tuple[tuple[str, ...], Tensor]:
        """All distinct captions of the index and their global features, encoded once."""
        if self._texts is None:
            names = tuple(dict.fromkeys(text for image in self.index.images for text in image.captions))
            self._texts = names, self._text_features(names)
        return self._texts

    def _text_features(self, texts: Sequence[str], batch: int = 64) -> Tensor:
        parts = [self._encode(texts[start : start + batch]).feature.cpu() for start in range(0, len(texts), batch)]
        return torch.cat(parts) if parts else torch.empty(0, 1)


def _text(texts: EncodedTexts, number: int) -> EncodedTexts:
    one = slice(number, number + 1)
    return EncodedTexts(texts.feature[one], texts.side and type(texts.side)(*(part[one] for part in texts.side)))


def _image(images: EncodedImages, number: int) -> EncodedImages:
    return EncodedImages.of(tuple(part[number : number + 1] for part in images.fields()))
