"""Re-ranking: rankings of one evaluation that use more than the scores of one query.

Most ask the candidates back, and so need all *test* queries at once, which a search does not have: they are labelled
"transductive" wherever they are reported.  With a bank of training queries instead, a search could do the same.
Sources and choices: docs/explanation/methods.md.

Shapes: I images, C distinct captions, Q queries, G candidates (one of them images, the other captions), K bank queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..data.captioned import CaptionedImage, EvalDataError
from ..data.pixels import Preprocess
from ..distributed import Peers
from .eval_set import EvalSet
from .evaluate import TIE, Evaluation, encode_images
from .metrics import GroundTruth, Retrieval
from .options import RERANKINGS, EvalOptions
from .rank_counter import retrieval
from .scorer import EncodedImages, Scorer, Tokenizer

CANDIDATES = 20
"""First candidates of a query that `reverse_sorted` and `many_factors` put in a new order."""
BANK = 2000
"""Most training queries of each kind that a bank holds."""


def query_bank_normalised(scores: Tensor, bank: Tensor) -> Tensor:
    """QB-Norm (Bogolin and others, 2022): candidates lose what they score with a bank's queries as a whole.

        s'(q, g) = b s(q, g) - log sum_k exp(b s(k, g))

    That is its inverted softmax, without the test for which queries to use it.  b is 2 over the standard deviation of
    the bank's scores, so that cosines and logits are treated alike.

    Args:
        scores: (Q, G).
        bank: (K, G) scores of the bank's queries with the same candidates.
    """
    sharpness = 2 / bank.std().clamp(min=1e-6)
    return sharpness * scores - (sharpness * bank).logsumexp(dim=0)


def reverse_sorted(scores: Tensor) -> Tensor:
    """EBAKER's sorting after reversed retrieval, of (Q, G) scores: the first candidates by where they rank the query.

    Equal ones keep their order.
    """
    place = _ranks(scores)
    nearest = (scores - scores.min()) / (scores.max() - scores.min()).clamp(min=1e-6)  # 0 to 1, breaks ties
    return _in_front(scores, -place + 0.5 * nearest + len(scores) + 1)


def many_factors(scores: Tensor) -> Tensor:
    """After GaLR's multivariate re-ranking of (Q, G) scores: similarity, rank and reverse rank of first candidates.

    Its idea is published in words, "k candidates for reverse search, multiple ranking factors"; the factors here are
    the similarity between the first candidate's (1) and the k-th's (0), 1 / rank and 1 / reverse rank, added up.
    """
    count = min(CANDIDATES, scores.shape[1])
    first = scores.topk(count, dim=1).values
    share = (scores - first[:, -1:]) / (first[:, :1] - first[:, -1:]).clamp(min=1e-6)
    rank = _ranks(scores.T).T
    return _in_front(scores, share.clamp(0, 1) + 1 / rank + 1 / _ranks(scores))


def _ranks(scores: Tensor) -> Tensor:
    """(Q, G): where candidate g ranks query q among all queries, from 1; the mean of the ranks of equal ones."""
    columns = scores.T.contiguous()
    ordered = columns.sort(dim=1).values
    below = torch.searchsorted(ordered, columns)
    not_above = torch.searchsorted(ordered, columns, right=True)
    return (len(scores) - (below + not_above).T / 2 + 0.5).to(scores.dtype)


def _in_front(scores: Tensor, values: Tensor) -> Tensor:
    """(Q, G) positive `values` for the first candidates of each query, behind them the others as they were."""
    count = min(CANDIDATES, scores.shape[1])
    first, at = scores.topk(count, dim=1)
    behind = scores - first[:, :1] - 1
    return behind.scatter(1, at, values.gather(1, at))


def rerank(
    evaluation: Evaluation,
    scorer: Scorer,
    preprocess: Preprocess,
    tokenizer: Tokenizer,
    methods: Sequence[str],
    *,
    bank: Sequence[CaptionedImage] = (),
    options: EvalOptions | None = None,
) -> Evaluation:
    """`evaluation` with further rankings: its main one re-ranked, as `fused, qb-norm (transductive)` and the like.

        with_bank = rerank(evaluation, model.scorer, model.preprocess, model.tokenizer, ["qb-norm-bank"], bank=train)

    Args:
        evaluation: of the same model.
        scorer, preprocess, tokenizer: the model.
        methods: of RERANKINGS.
        bank: training images with captions, for `qb-norm-bank`.
        options: batch size, memory.
    Raises:
        ValueError: a method is unknown, or the scores of all pairs do not fit the memory.
        EvalDataError: a bank is wanted and there is none.
    """
    options = options or EvalOptions()
    for method in methods:
        if method not in RERANKINGS:
            raise ValueError(f"rerank: {method!r} is unknown; choose from {', '.join(RERANKINGS)}.")
    data = evaluation.data
    matrix = _Matrix(scorer, tokenizer, options)
    scores = matrix(evaluation.images, data.texts)
    banks: tuple[Tensor, Tensor] | None = None
    if "qb-norm-bank" in methods:
        banks = _bank_scores(matrix, evaluation, preprocess, bank, options)
    per_caption, merged = dict(evaluation.per_caption), dict(evaluation.merged)
    parts = {name: dict(rankings) for name, rankings in evaluation.parts.items()}
    for method in methods:
        name = f"{scorer.main_ranking}, {RERANKINGS[method]}"
        both = _both_ways(method, scores, banks)
        per_caption[name] = _retrieval(both, data.per_caption)
        merged[name] = _retrieval(both, data.merged)
        for part, keep in data.parts.items():
            parts[part][name] = _retrieval(both, data.per_caption.only(keep))
    return replace(evaluation, per_caption=per_caption, merged=merged, parts=parts)


def _both_ways(method: str, scores: Tensor, banks: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """(I, C) scores by which images rank captions, and by which captions rank images."""
    if method in ("galr", "sar"):
        change: Callable[[Tensor], Tensor] = many_factors if method == "galr" else reverse_sorted
        return change(scores), change(scores.T).T
    by_images, by_texts = (scores, scores.T) if banks is None or method == "qb-norm" else banks
    return query_bank_normalised(scores, by_images), query_bank_normalised(scores.T, by_texts).T


def _retrieval(both: tuple[Tensor, Tensor], truth: GroundTruth) -> Retrieval:
    images, texts = (retrieval(scores, truth, tolerance=TIE * float(scores.abs().max())) for scores in both)
    return Retrieval(truth, images.image_to_text, texts.text_to_image)


class _Matrix:
    """Scores of images with captions by a model's main ranking, all at once."""

    def __init__(self, scorer: Scorer, tokenizer: Tokenizer, options: EvalOptions) -> None:
        self.scorer, self.tokenizer, self.options = scorer, tokenizer, options
        self.ranking = scorer.rankings.index(scorer.main_ranking)

    def __call__(self, images: EncodedImages, captions: Sequence[str]) -> Tensor:
        """(I, C), in strips of a batch of captions."""
        count, size = len(images.feature), self.options.batch_size
        if 4 * count * len(captions) > self.options.memory_bytes:
            raise ValueError(
                f"rerank: the scores of {count} images and {len(captions)} captions take more than memory_mb "
                f"{self.options.memory_mb}; give more, or evaluate without re-ranking."
            )
        strips = []
        for start in range(0, len(captions), size):
            texts = self.scorer.texts(self.tokenizer(list(captions[start : start + size])))
            spans = [slice(row, row + size) for row in range(0, count, size)]
            parts = [EncodedImages.of(tuple(x[span].to(self.scorer.device) for x in images.fields())) for span in spans]
            strips.append(torch.cat([self.scorer.scores(part, texts)[self.ranking].cpu() for part in parts]))
        return torch.cat(strips, dim=1)


def _bank_scores(
    matrix: _Matrix,
    evaluation: Evaluation,
    preprocess: Preprocess,
    bank: Sequence[CaptionedImage],
    options: EvalOptions,
) -> tuple[Tensor, Tensor]:
    """Scores of the bank's images with the captions that are rated, and of its captions with the images."""
    if not bank:
        raise EvalDataError("rerank: qb-norm-bank needs training images with captions; name them by --bank.")
    known = EvalSet(bank[:BANK], "bank")
    images = encode_images(matrix.scorer, known, preprocess, options, Peers())
    return matrix(images, evaluation.data.texts), matrix(evaluation.images, known.texts[:BANK]).T
