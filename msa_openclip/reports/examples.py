"""Chooses captions to show: whose images a model finds last, and which it is surest of; with answers and reasons.

Shapes: I images, C chosen captions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..data.captioned import CaptionedImage
from ..data.pixels import load_dates
from ..evaluation.evaluate import Evaluation
from ..evaluation.loading import LoadedModel
from ..evaluation.scorer import EncodedImages
from ..explain.explanation import Explanation, explain
from ..explain.figure import view

_HARDEST, _SUREST, _ANSWERS = 12, 4, 4
_TRIED = 64  # captions with the right image first among which the surest are looked for


class Reason(NamedTuple):
    """Why an image got its score."""

    image: CaptionedImage
    view: Image.Image
    """As the model sees it."""
    explanation: Explanation


@dataclass(frozen=True)
class Example:
    """A caption, its image with its rank, and the images that came first."""

    caption: str
    image: CaptionedImage
    rank: float
    answers: tuple[CaptionedImage, ...]
    """The best images by the main ranking, best first."""
    reasons: tuple[Reason, ...]
    """Of its image and, where another came first, of that one; none without MSCMAT."""


@dataclass(frozen=True)
class Examples:
    """The chosen captions of one model, by its main ranking; no image has two captions in a list."""

    hardest: tuple[Example, ...]
    """The right image comes latest."""
    surest: tuple[Example, ...]
    """The right image is first, by the widest margin."""


def find_examples(model: LoadedModel, evaluation: Evaluation) -> Examples:
    """Choose, answer and explain captions of an evaluation.

    Raises:
        EvalDataError: an image cannot be read.
    """
    ranks = evaluation.per_caption[model.scorer.main_ranking].text_to_image.ranks()
    hardest = _one_per_image(evaluation, ranks.argsort(descending=True).tolist())[:_HARDEST]
    first = _one_per_image(evaluation, (ranks == 1).nonzero().flatten().tolist())
    tried = first[:: max(1, len(first) // _TRIED)]
    comparable = tried and len(evaluation.data.images) > 1
    margin = _best(model, evaluation, tried, 2)[0].diff().flatten() if comparable else Tensor()
    surest = [tried[number] for number in margin.argsort().tolist()[:_SUREST]]  # margins are negative
    return Examples(*(_examples(model, evaluation, ranks, queries) for queries in (hardest, surest)))


def _one_per_image(evaluation: Evaluation, queries: Sequence[int]) -> list[int]:
    """The first of the queries of each image."""
    first: dict[int, int] = {}
    for query in queries:
        first.setdefault(int(evaluation.data.per_caption.pair_image[query]), query)
    return list(first.values())


def _best(model: LoadedModel, evaluation: Evaluation, queries: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
    """Scores and numbers (C, count) of the best images of some queries."""
    data, scorer = evaluation.data, model.scorer
    columns = data.per_caption.query_column[list(queries)].tolist()
    texts = scorer.texts(model.tokenizer([data.texts[column] for column in columns]))
    row = scorer.rankings.index(scorer.main_ranking)
    step = max(1, (64 << 20) // (len(columns) * scorer.bytes_per_pair(texts)))
    parts = []
    for rows in torch.arange(len(data.images)).split(step):  # type: ignore[no-untyped-call]
        some = EncodedImages.of(tuple(x[rows.to(x.device)].to(scorer.device) for x in evaluation.images.fields()))
        parts.append(scorer.scores(some, texts)[row].cpu())
    best = torch.cat(parts).T.topk(min(count, len(data.images)), dim=1)
    return best.values, best.indices


def _examples(model: LoadedModel, evaluation: Evaluation, ranks: Tensor, queries: Sequence[int]) -> tuple[Example, ...]:
    if not queries:
        return ()
    data, truth = evaluation.data, evaluation.data.per_caption
    answers = _best(model, evaluation, queries, _ANSWERS)[1].tolist()
    chosen = []
    for query, numbers in zip(queries, answers, strict=True):
        caption, image = data.texts[int(truth.query_column[query])], data.images[int(truth.pair_image[query])]
        shown = tuple(data.images[number] for number in numbers)
        explained = ([image] if image is shown[0] else [image, shown[0]]) if model.scorer.has_match else []
        reasons = tuple(_reason(model, item, caption) for item in explained)
        chosen.append(Example(caption, image, float(ranks[query]), shown, reasons))
    return tuple(chosen)


def _reason(model: LoadedModel, image: CaptionedImage, caption: str) -> Reason:
    pictures = load_dates(image)
    return Reason(image, view(model, pictures), explain(model, pictures, caption))
