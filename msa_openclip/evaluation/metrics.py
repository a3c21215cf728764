"""Retrieval metrics: pure functions of where the right answers rank, and of which caption is right for which image.

Protocol of docs/method.md, section 3: an image finds its text when *any* of its captions is in the top k; a caption
finds its image when that image is in the top k.  Ties are never resolved by position: by default every order of equal
scores is equally likely and the expected hit counts, or (``ties="pessimistic"``) the right answer comes last among its
equals.

Shapes: I images, C score columns (distinct texts), P right (image, column) pairs, Q text queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Ties = Literal["expected", "pessimistic"]
CUTOFFS = (1, 5, 10)


@dataclass(frozen=True)
class GroundTruth:
    """Which answers are right, by the field's protocol (`per_caption`) or with identical captions as one (`merged`)."""

    images: int
    column_copies: Tensor
    """(C,): how many captions of the gallery share the column, hence its score."""
    query_column: Tensor
    """(Q,): the column that holds the scores of text query q, not decreasing."""
    pair_image: Tensor
    """(P,): an image ..."""
    pair_query: Tensor
    """(P,): ... and a text query it answers, not decreasing."""

    @classmethod
    def per_caption(
        cls, text_to_image: Tensor, *, column: Tensor | None = None, images: int | None = None
    ) -> GroundTruth:
        """Every caption is a query and a gallery entry of its own, also where its words occur again.

        Args:
            text_to_image: (T,) the image of each caption.
            column: (T,) not decreasing, the score column of each caption; by default its own.
            images: I; by default the highest image of `text_to_image`, plus one.  An image without captions distracts.
        Raises:
            ValueError: `column` decreases, or an image is out of range.
        """
        column = torch.arange(len(text_to_image)) if column is None else column
        images = _checked_images(text_to_image, column, images)
        return cls(images, torch.bincount(column), column, text_to_image, torch.arange(len(column)))

    @classmethod
    def merged(cls, text_to_image: Tensor, *, column: Tensor | None = None, images: int | None = None) -> GroundTruth:
        """The second protocol: identical captions are one query and one gallery entry, with all their images right."""
        column = torch.arange(len(text_to_image)) if column is None else column
        images = _checked_images(text_to_image, column, images)
        query_column, query = column.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        pairs = torch.stack([query, text_to_image]).unique(dim=1)  # type: ignore[no-untyped-call]
        return cls(
            images, torch.bincount(column).clamp(max=1), query_column, pairs[1].contiguous(), pairs[0].contiguous()
        )

    def only(self, keep: Tensor) -> GroundTruth:
        """The same protocol on some of the captions: the others are neither asked nor stand in the gallery.

        All images stay in the gallery; those that are left without a caption are no queries.

        Example:
            >>> unseen = retrieval(scores, truth.only(~seen)).summary()["mR"]

        Args:
            keep: (C,) True for the columns that stay.
        Raises:
            ValueError: `keep` has another length, or nothing stays to ask.
        """
        stays = keep[self.query_column] if len(keep) == len(self.column_copies) else keep.new_zeros(0)
        if not stays.any():
            raise ValueError(f"keep: {int(keep.sum())} of {len(keep)} columns, of {len(self.column_copies)} captions.")
        pairs = stays[self.pair_query]
        return GroundTruth(
            self.images,
            torch.where(keep, self.column_copies, 0),
            self.query_column[stays],
            self.pair_image[pairs],
            (stays.cumsum(0) - 1)[self.pair_query[pairs]],
        )

    @property
    def pair_column(self) -> Tensor:
        """(P,): the score column of each right pair, not decreasing."""
        return self.query_column[self.pair_query]


def _checked_images(text_to_image: Tensor, column: Tensor, images: int | None) -> int:
    if text_to_image.ndim != 1 or text_to_image.shape != column.shape or not len(column):
        shapes = f"{tuple(text_to_image.shape)} and {tuple(column.shape)}"
        raise ValueError(f"text_to_image and column must be two vectors of one length, not empty; got {shapes}.")
    if (column.diff() < 0).any() or int(column[0]) < 0:
        raise ValueError("column must not decrease; sort the captions by their column first.")
    low, high = int(text_to_image.min()), int(text_to_image.max())
    images = high + 1 if images is None else images
    if low < 0 or high >= images:
        raise ValueError(f"text_to_image holds {low} to {high}; expected 0 to {images - 1} for {images} images.")
    return images


@dataclass(frozen=True)
class Ranks:
    """Where the best right answer of every query stands, as counts of the gallery; all (Q,) int64."""

    above: Tensor
    """Wrong answers with a higher score."""
    tied: Tensor
    """Wrong answers with an equal score."""
    right: Tensor
    """Right answers at the best score; 0 marks an item that is no query (an image without captions)."""

    def hits(self, k: int, ties: Ties = "expected") -> Tensor:
        """(Q,) float64: the probability that a right answer is among the first k."""
        if ties == "pessimistic":
            return ((self.above + self.tied < k) & (self.right > 0)).double()
        slots = k - self.above
        miss = torch.ones(len(self.above), dtype=torch.float64)
        for taken in range(k):  # the chance that the next of the equals, drawn without replacement, is wrong again
            wrong = (self.tied - taken).clamp(min=0) / (self.tied + self.right - taken).clamp(min=1)
            miss = torch.where(taken < slots, miss * wrong.double(), miss)
        return (1.0 - miss) * (self.right > 0)

    def ranks(self, ties: Ties = "expected") -> Tensor:
        """(Q,) float64: the rank of the first right answer, 1 is best; its expectation where scores tie."""
        if ties == "pessimistic":
            return (self.above + self.tied + 1).double()
        return self.above + (self.tied + self.right + 1).double() / (self.right + 1)


@dataclass(frozen=True)
class Retrieval:
    """Ranks in both directions: what a model's scores on one set come down to."""

    truth: GroundTruth
    image_to_text: Ranks
    """One query per image."""
    text_to_image: Ranks
    """One query per text query of `truth`."""

    def summary(self, ties: Ties = "expected", cutoffs: Sequence[int] = CUTOFFS) -> dict[str, float]:
        """Recalls in percent, their mean mR, and mean and median rank (of the expected ranks, where scores tie)."""
        names, hit, weight = self._per_image(ties, cutoffs)
        values = dict(zip(names, (hit.sum(0) / weight.sum(0)).tolist(), strict=True))
        for name, ranks in self._directions():
            values[f"{name}_median_rank"] = float(np.median(ranks.ranks(ties)[ranks.right > 0].numpy()))
        return _with_mean_recall(values)

    def by_class(self, classes: Tensor, ties: Ties = "expected") -> dict[int, dict[str, float]]:
        """`summary` without median ranks of the queries of each image class; `classes` is (I,).

        Candidates stay the whole gallery.  Classes without queries are left out.
        """
        names, hit, weight = self._per_image(ties, CUTOFFS)
        found = {}
        for label in sorted(set(classes.tolist())):
            member = classes == label
            if (weight[member].sum(0) > 0).all():
                values = (hit[member].sum(0) / weight[member].sum(0)).tolist()
                found[label] = _with_mean_recall(dict(zip(names, values, strict=True)))
        return found

    def bootstrap(
        self, ties: Ties = "expected", samples: int = 1000, level: float = 0.95, seed: int = 0
    ) -> dict[str, tuple[float, float]]:
        """Percentile confidence intervals of `summary`, images (with all their captions) drawn with replacement.

        The gallery is kept: what varies is which images are asked about.  Median ranks have no interval.
        """
        if samples < 2 or not 0.0 < level < 1.0:
            raise ValueError(f"bootstrap needs 2 samples or more and a level within (0, 1); got {samples} and {level}.")
        names, hit, weight = self._per_image(ties, CUTOFFS)
        asked = weight.sum(1) > 0
        hit, weight = hit[asked], weight[asked]
        generator = torch.Generator().manual_seed(seed)
        drawn = []
        for _ in range(samples):
            draw = torch.randint(len(hit), (len(hit),), generator=generator)
            times = torch.bincount(draw, minlength=len(hit)).double()
            values = dict(zip(names, ((times @ hit) / (times @ weight)).tolist(), strict=True))
            drawn.append(list(_with_mean_recall(values).values()))
        tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
        low, high = torch.tensor(drawn, dtype=torch.float64).quantile(tails, dim=0).tolist()
        keys = _with_mean_recall(dict.fromkeys(names, 0.0))
        return {name: (a, b) for name, a, b in zip(keys, low, high, strict=True)}

    def _directions(self) -> tuple[tuple[str, Ranks], tuple[str, Ranks]]:
        return ("i2t", self.image_to_text), ("t2i", self.text_to_image)

    def _per_image(self, ties: Ties, cutoffs: Sequence[int]) -> tuple[list[str], Tensor, Tensor]:
        """Every mean metric as sums over images: names, (I, M) of value times weight, and (I, M) of weight.

        A text query with several right images is shared among them in equal parts.
        """
        truth = self.truth
        owners = torch.bincount(truth.pair_query, minlength=len(truth.query_column)).double()
        names, values, weights = [], [], []
        for direction, ranks in self._directions():
            for name, value in [
                *((f"{direction}_R@{k}", 100.0 * ranks.hits(k, ties)) for k in cutoffs),
                (f"{direction}_mean_rank", ranks.ranks(ties)),
            ]:
                weight = (ranks.right > 0).double()
                value = value * weight
                if direction == "t2i":
                    value, weight = (
                        torch.zeros(truth.images, dtype=torch.float64).index_add_(
                            0, truth.pair_image, (share / owners)[truth.pair_query]
                        )
                        for share in (value, weight)
                    )
                names.append(name)
                values.append(value)
                weights.append(weight)
        return names, torch.stack(values, dim=1), torch.stack(weights, dim=1)


def _with_mean_recall(values: dict[str, float]) -> dict[str, float]:
    recalls = [value for name, value in values.items() if "_R@" in name]
    return {**values, "mR": sum(recalls) / len(recalls)}
