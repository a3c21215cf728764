"""Counts exact ranks from tiles of scores, so that the matrix of images x texts is never held whole.

The best right answer of every query is known first; then each tile only adds how many wrong answers stand above it and
beside it.  Shapes: I images, C score columns (distinct texts), P right (image, column) pairs, Q text queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .metrics import GroundTruth, Ranks, Retrieval


class RankCounter:
    """Counts, tile after tile, the wrong answers above and beside the best right one; exact in any order of tiles."""

    def __init__(self, truth: GroundTruth, right_scores: Tensor, *, tolerance: float = 0.0) -> None:
        """Start from the scores of the right pairs.

        Args:
            truth: the right answers.
            right_scores: (P,) score of each right pair of `truth`.
            tolerance: scores this close to the right one count as equal to it, being ordered by rounding alone.
        Raises:
            ValueError: `right_scores` has another length or holds NaN.
        """
        if right_scores.shape != truth.pair_image.shape:
            raise ValueError(f"right_scores: expected {len(truth.pair_image)} scores, got {tuple(right_scores.shape)}.")
        _refuse_nan(right_scores)
        device = right_scores.device
        self.truth, self.tolerance = truth, tolerance
        self._copies = truth.column_copies.to(device)
        self._query_column, self._pair_column = truth.query_column.to(device), truth.pair_column.to(device)
        self._pair_image, self._pair_query = truth.pair_image.to(device), truth.pair_query.to(device)
        self._image_best, self._image_right = self._best(right_scores, self._pair_image, truth.images)
        self._text_best, self._text_right = self._best(right_scores, self._pair_query, len(self._query_column))
        self.counts = torch.zeros(2, truth.images + len(self._query_column), dtype=torch.int64, device=device)
        """(2, I + Q) wrong answers above and beside, images first: tiles counted elsewhere can simply be added."""

    def _best(self, right_scores: Tensor, group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """Best right score per query, and how many right answers share it."""
        best = right_scores.new_full((groups,), float("-inf")).scatter_reduce_(0, group, right_scores, "amax")
        shared = right_scores >= best[group] - self.tolerance
        return best, torch.zeros(groups, dtype=torch.int64, device=group.device).index_add_(0, group, shared.long())

    def add(self, scores: Tensor, row: int = 0, column: int = 0) -> None:
        """Count one tile: `scores` is (rows, columns), its corner at image `row` and score column `column`."""
        _refuse_nan(scores)
        rows, columns = scores.shape
        image_counts, text_counts = self.counts[:, : self.truth.images], self.counts[:, self.truth.images :]
        images = slice(row, row + rows)
        copies = self._copies[column : column + columns]
        for count, mask in zip(image_counts, self._compare(scores, self._image_best[images, None]), strict=True):
            count[images] += torch.where(mask, copies, 0).sum(dim=1)
        queries = _span(self._query_column, column, columns)
        by_query = scores[:, self._query_column[queries] - column]
        for count, mask in zip(text_counts, self._compare(by_query, self._text_best[queries]), strict=True):
            count[queries] += mask.sum(dim=0)
        self._take_back_right(scores, row, column)

    def _take_back_right(self, scores: Tensor, row: int, column: int) -> None:
        """Uncount the right pairs that the tile holds, so that only wrong answers stay counted."""
        rows, columns = scores.shape
        pairs = _span(self._pair_column, column, columns)
        image, query, at = self._pair_image[pairs], self._pair_query[pairs], self._pair_column[pairs] - column
        inside = (image >= row) & (image < row + rows)
        image, query, at = image[inside], query[inside], at[inside]
        right = scores[image - row, at]
        for count, mask in zip(self.counts, self._compare(right, self._image_best[image]), strict=True):
            count.index_add_(0, image, -mask.long())
        for count, mask in zip(self.counts, self._compare(right, self._text_best[query]), strict=True):
            count.index_add_(0, query + self.truth.images, -mask.long())

    def _compare(self, scores: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
        """Where scores are above the best right one, and where beside it."""
        if not self.tolerance:
            return scores > best, scores == best
        above = scores > best + self.tolerance
        return above, (scores >= best - self.tolerance) & ~above

    def result(self) -> Retrieval:
        """The ranks, once every tile has been added exactly once."""
        above, tied = self.counts.cpu()
        images = self.truth.images
        return Retrieval(
            self.truth,
            Ranks(above[:images], tied[:images], self._image_right.cpu()),
            Ranks(above[images:], tied[images:], self._text_right.cpu()),
        )


def _span(sorted_columns: Tensor, start: int, length: int) -> slice:
    """The stretch of a not decreasing vector that lies in [start, start + length)."""
    edges = torch.tensor([start, start + length], device=sorted_columns.device)
    first, last = torch.searchsorted(sorted_columns, edges).tolist()
    return slice(first, last)


def _refuse_nan(scores: Tensor) -> None:
    if torch.isnan(scores).any():
        raise ValueError("scores hold NaN, which no ranking can order; check the model's weights and precision.")


def retrieval(scores: Tensor, truth: GroundTruth, *, tolerance: float = 0.0) -> Retrieval:
    """Ranks from a whole score matrix; `RankCounter` does the same for matrices too large to exist.

    Args:
        scores: (I, C), higher is better.
        truth: the right answers.
        tolerance: see `RankCounter`.
    Raises:
        ValueError: `scores` has another shape than `truth` or holds NaN.
    """
    expected = (truth.images, len(truth.column_copies))
    if tuple(scores.shape) != expected:
        raise ValueError(f"scores: expected {expected} (images, columns), got {tuple(scores.shape)}.")
    right = scores[truth.pair_image.to(scores.device), truth.pair_column.to(scores.device)]
    counter = RankCounter(truth, right, tolerance=tolerance)
    counter.add(scores)
    return counter.result()
