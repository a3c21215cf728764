"""The evaluator: one model on one set of captioned images, by every ranking and both protocols, in bounded memory.

Images are encoded once.  Distinct captions are encoded strip by strip; a first pass finds the scores of the right
pairs, a second one counts what stands above them.  Strips whose scores fit the budget are kept between the passes, the
others are computed again, so the result does not depend on the budget and the score matrix need never exist.
Ranks of a distributed run share images and strips and add up their counts.

Shapes: I images, C distinct captions (score columns), R rankings, P right (image, caption) pairs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from ..data.pixels import Preprocess, batch_spans, batches
from ..distributed import Peers, failing_together
from .eval_set import EvalSet
from .metrics import GroundTruth, Retrieval, Ties
from .options import EvalOptions
from .rank_counter import RankCounter
from .scorer import EncodedImages, EncodedTexts, Scorer, Tokenizer

TIE = 2e-6
"""Scores that differ by less than this share of the largest right one are ordered by rounding alone: ties."""


@dataclass(frozen=True)
class Evaluation:
    """Ranks by every ranking of a model on one set."""

    data: EvalSet
    per_caption: dict[str, Retrieval]
    """The field's protocol."""
    merged: dict[str, Retrieval]
    """Identical captions as one query with several right images."""
    images: EncodedImages
    """The encoded images, in the order of `data`."""
    parts: Mapping[str, dict[str, Retrieval]]
    """The field's protocol on parts of the captions, by part."""

    def summaries(self, ties: Ties = "expected", *, merged: bool = False) -> dict[str, dict[str, float]]:
        """Metrics by ranking: recalls and mR in percent, mean and median ranks."""
        rankings = self.merged if merged else self.per_caption
        return {name: retrieval.summary(ties) for name, retrieval in rankings.items()}


def evaluate(
    scorer: Scorer,
    data: EvalSet,
    preprocess: Preprocess,
    tokenizer: Tokenizer,
    options: EvalOptions | None = None,
    peers: Peers | None = None,
) -> Evaluation:
    """Rank every image for every caption and the other way round.

        data = EvalSet(read_shards("ucm/test-{000000..000003}.tar"), "UCM test")
        evaluation = evaluate(model.scorer, data, model.preprocess, model.tokenizer)
        print(evaluation.summaries()["fused"]["mR"])

    Args:
        scorer: the model.
        data: the images and captions.
        preprocess: PIL image -> (3, h, w), open_clip's validation transform.
        tokenizer: list of captions -> token ids (T, L).
        options: batch size, memory.
        peers: in a distributed run, which share is ours; all ranks get the whole result.
    Raises:
        EvalDataError: an image cannot be read, or is of another number of dates than the model takes.
        ValueError: the model's scores hold NaN.
    """
    options, peers = options or EvalOptions(), peers or Peers()
    scorer.require_dates(data.images)
    images = encode_images(scorer, data, preprocess, options, peers)
    blocks = _CaptionBlocks(scorer, data, tokenizer, images, options, peers)
    right = blocks.right_scores()
    truths = [data.per_caption, data.merged, *(data.per_caption.only(keep) for keep in data.parts.values())]
    per_caption, merged, *of_parts = blocks.count(right, truths)
    return Evaluation(data, per_caption, merged, images, dict(zip(data.parts, of_parts, strict=True)))


def encode_images(
    scorer: Scorer, data: EvalSet, preprocess: Preprocess, options: EvalOptions, peers: Peers
) -> EncodedImages:
    """Encode this rank's batches and get the others': all images, on the device or, if that is too much, on disk."""
    total = len(data.images)
    spans = batch_spans(total, options.batch_size)
    mine = spans[peers.rank :: peers.world_size] or spans[:1]  # one at least, to learn the shapes from
    bank: tuple[Tensor, ...] = ()
    shown = options.progress and peers.rank == 0
    progress = tqdm(total=sum(map(len, mine)), desc="encoding images", unit=" images", leave=False, disable=not shown)
    with failing_together(peers), progress as bar:
        for span, pixels in zip(mine, batches(data.images, preprocess, mine, options.workers), strict=True):
            fields = scorer.images(pixels).fields()
            bank = bank or _allocate(fields, total, options.memory_bytes // 2)
            for whole, part in zip(bank, fields, strict=True):
                whole[span.start : span.stop] = part.to(whole.device)
            bar.update(len(span))
    if peers.world_size > 1:
        for number, span in enumerate(spans):
            for whole in bank:
                part = whole[span.start : span.stop].to(scorer.device).contiguous()
                dist.broadcast(part, src=number % peers.world_size)
                whole[span.start : span.stop] = part.to(whole.device)
    return EncodedImages.of(bank)


def _allocate(fields: Sequence[Tensor], rows: int, memory_bytes: int) -> tuple[Tensor, ...]:
    """Room for `rows` rows of each field: in memory beside the first, in unnamed temporary files where that is full."""
    row_bytes = sum(4 * field[0].numel() for field in fields)
    if rows * row_bytes <= memory_bytes:
        return tuple(field.new_empty((rows, *field.shape[1:])) for field in fields)
    banks = []
    for field in fields:
        with tempfile.TemporaryFile() as file:  # the mapping keeps it alive
            mapped = np.memmap(file, dtype=np.float32, mode="w+", shape=(rows, *field.shape[1:]))
        banks.append(torch.from_numpy(mapped))
    return tuple(banks)


class _Tile(NamedTuple):
    """Scores (R, rows, columns) of the images `rows` with the captions from `column` on."""

    rows: Tensor
    column: int
    scores: Tensor


class _CaptionBlocks:
    """The distinct captions in strips of a batch, this rank's share of them, and what is kept of their scores."""

    def __init__(
        self,
        scorer: Scorer,
        data: EvalSet,
        tokenizer: Tokenizer,
        images: EncodedImages,
        options: EvalOptions,
        peers: Peers,
    ) -> None:
        self.scorer, self.data, self.tokenizer, self.images, self.peers = scorer, data, tokenizer, images, peers
        self.size = options.batch_size
        self.tile_bytes = self.spare_bytes = options.memory_bytes // 4
        self.starts = range(0, len(data.texts), self.size)[peers.rank :: peers.world_size]
        self.progress = options.progress and peers.rank == 0
        self.kept: dict[int, list[_Tile]] = {}
        # Pairs of `merged` are the distinct ones, ordered by column, then image.
        self.pair_image, self.pair_column = data.merged.pair_image, data.merged.pair_column

    def right_scores(self) -> Tensor:
        """First pass: (R, P) scores of the distinct right pairs."""
        right = torch.zeros(len(self.scorer.rankings), len(self.pair_image), device=self.scorer.device)
        everyone = torch.arange(len(self.data.images))
        with failing_together(self.peers):
            for start in self._strips("scoring captions"):
                texts = self._encode(start)
                owners = self.pair_image[self._pairs(start)].unique()  # type: ignore[no-untyped-call]
                strip_bytes = 4 * len(self.scorer.rankings) * len(everyone) * len(texts.feature)
                if strip_bytes <= self.spare_bytes:
                    self.spare_bytes -= strip_bytes
                    self.kept[start] = list(self._tiles(texts, everyone, start))
                for tile in self.kept.get(start) or self._tiles(texts, owners, start):
                    self._pick(tile, right)
        if self.peers.world_size > 1:
            dist.all_reduce(right)
        return right

    def count(self, right: Tensor, truths: Sequence[GroundTruth]) -> list[dict[str, Retrieval]]:
        """Second pass: by each of the truths the ranks by each ranking."""
        merged, images = self.data.merged, len(self.data.images)
        distinct = merged.pair_column * images + merged.pair_image
        places = [torch.searchsorted(distinct, truth.pair_column * images + truth.pair_image) for truth in truths]
        counters = []
        for scores in right:
            tolerance = TIE * float(scores.abs().max())
            counters.append(
                [
                    RankCounter(truth, scores[place.to(scores.device)], tolerance=tolerance)
                    for truth, place in zip(truths, places, strict=True)
                ]
            )
        everyone = torch.arange(images)
        with failing_together(self.peers):
            for start in self._strips("counting ranks"):
                for tile in self.kept.pop(start, None) or self._tiles(self._encode(start), everyone, start):
                    for of_ranking, scores in zip(counters, tile.scores, strict=True):
                        for counter in of_ranking:
                            counter.add(scores, int(tile.rows[0]), tile.column)
        if self.peers.world_size > 1:
            for counter in (counter for of_ranking in counters for counter in of_ranking):
                dist.all_reduce(counter.counts)
        names = self.scorer.rankings
        by_truth = zip(*([counter.result() for counter in of_ranking] for of_ranking in counters), strict=True)
        return [dict(zip(names, results, strict=True)) for results in by_truth]

    def _strips(self, doing: str) -> Iterator[int]:
        """The first captions of this rank's strips, with a progress bar."""
        return iter(tqdm(self.starts, desc=doing, unit=" batches", leave=False, disable=not self.progress))

    def _encode(self, start: int) -> EncodedTexts:
        return self.scorer.texts(self.tokenizer(list(self.data.texts[start : start + self.size])))

    def _pairs(self, start: int) -> slice:
        """The right pairs whose caption lies in the strip."""
        edges = torch.searchsorted(self.pair_column, torch.tensor([start, start + self.size])).tolist()
        return slice(*edges)

    def _tiles(self, texts: EncodedTexts, rows: Tensor, start: int) -> Iterator[_Tile]:
        """Scores of a strip with the images `rows`, as many at a time as the budget allows."""
        columns = len(texts.feature)
        step = max(1, self.tile_bytes // (columns * self.scorer.bytes_per_pair(texts)))
        for chosen in torch.split(rows, step):
            part = (field[chosen.to(field.device)].to(self.scorer.device) for field in self.images.fields())
            yield _Tile(chosen, start, self.scorer.scores(EncodedImages.of(tuple(part)), texts))

    def _pick(self, tile: _Tile, right: Tensor) -> None:
        """Put the scores of the right pairs of a tile in their places; `tile.rows` is sorted."""
        pairs = self._pairs(tile.column)
        image, column = self.pair_image[pairs], self.pair_column[pairs] - tile.column
        at = torch.searchsorted(tile.rows, image).clamp(max=len(tile.rows) - 1)
        inside = (tile.rows[at] == image).nonzero().flatten()
        device = right.device
        picked = tile.scores[:, at[inside].to(device), column[inside].to(device)]
        right[:, (inside + pairs.start).to(device)] = picked
