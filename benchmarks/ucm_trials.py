"""What was tried against the default on UCM-Captions and is not part of the package; for ucm_accuracy.py.

python benchmarks/ucm_trials.py TRIAL ARGUMENTS      ARGUMENTS of open_clip_train.main, which then trains with it
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from open_clip_train.data import detshuffle2
from open_clip_train.main import main as train
from torch import Tensor

from msa_openclip.model.mscmat import fused_scores
from msa_openclip.training import loader as data
from msa_openclip.training import loss
from msa_openclip.training.loss import MSALoss, ScoreBlock


class NearCopiesArePositives(MSALoss):
    """Captions that share most of their words count as identical ones do: positives of each other's images."""

    overlap = 0.75
    """Least share of the words of both captions that are in both (Jaccard)."""

    def _positive(self, own: Tensor, count: int, text_ids: Tensor | None) -> Tensor:
        assert text_ids is not None
        return (word_overlap(self.gather.features(text_ids)) >= self.overlap)[own]


class WeakestPairsDropped(MSALoss):
    """Elimination before alignment, after EBAKER: a batch's least correlated pairs ask for nothing.

    They stay what others are compared with.  By the fused score, as share of the row's and the column's softmax.
    """

    dropped = 0.1

    def _terms(self, per_image: ScoreBlock, per_text: ScoreBlock, logit_scale: Tensor) -> dict[str, Tensor]:
        belief = torch.zeros(len(per_image.pair), device=per_image.pair.device)
        for block in (per_image, per_text):
            scores = fused_scores(block.cosine, block.match, logit_scale, self.msa_cfg.ranking).detach().float()
            belief += scores.log_softmax(dim=1).gather(1, block.pair[:, None]).squeeze(1)
        kept = belief.argsort(descending=True)[: round(len(belief) * (1 - self.dropped))]
        return super()._terms(rows(per_image, kept), rows(per_text, kept), logit_scale)


class FusedScoreTeaches(MSALoss):
    """Consistency with the fused score, rather than the deepest scale, as teacher of every scale and of the cosine."""

    weight = 0.25

    def _terms(self, per_image: ScoreBlock, per_text: ScoreBlock, logit_scale: Tensor) -> dict[str, Tensor]:
        terms = super()._terms(per_image, per_text, logit_scale)
        both = [self._taught(block, logit_scale) for block in (per_image, per_text)]
        return terms | {"taught_loss": self.weight * (both[0] + both[1]) / 2}

    def _taught(self, block: ScoreBlock, logit_scale: Tensor) -> Tensor:
        assert block.match is not None
        scores = fused_scores(block.cosine, block.match, logit_scale, self.msa_cfg.ranking)
        teacher = scores.detach().float().log_softmax(dim=-1)
        students = torch.cat([(logit_scale * block.cosine)[None].float(), block.match.float()]).log_softmax(dim=-1)
        return (teacher.exp() * (teacher - students)).sum(dim=(0, -1)).mean()


class TwoCaptions(MSALoss):
    """A batch of half as many images, each twice, with two of its captions; both are positives of both."""

    def _positive(self, own: Tensor, count: int, text_ids: Tensor | None) -> Tensor:
        image = torch.arange(count, device=own.device) // 2
        return super()._positive(own, count, text_ids) | (image[own, None] == image[None, :])


class EachTwice(detshuffle2):  # type: ignore[misc]
    """Shuffled samples, each twice in a row: with one half of its captions to draw from, then with the other."""

    def run(self, samples: Iterator[Any]) -> Iterator[Any]:
        for sample in super().run(samples):
            for half in range(2):
                yield sample | {"captions": sample["captions"][half::2]}


def rows(block: ScoreBlock, kept: Tensor) -> ScoreBlock:
    """The block with some of its queries."""
    match = None if block.match is None else block.match[:, kept]
    return ScoreBlock(block.cosine[kept], match, block.positive[kept], block.pair[kept])


def word_overlap(ids: Tensor) -> Tensor:
    """Token ids (T, L) -> (T, T) share of common ones among the distinct ids of two texts, padding (0) left out."""
    held = torch.zeros(len(ids), int(ids.max()) + 1, device=ids.device).scatter_(1, ids, 1.0)
    held = held[:, 1:][:, held[:, 1:].any(dim=0)]
    common = held @ held.T
    count = held.sum(dim=1)
    return common / (count[:, None] + count[None, :] - common)


TRIALS: dict[str, type[MSALoss]] = {
    "near-copies-are-positives": NearCopiesArePositives,
    "weakest-pairs-dropped": WeakestPairsDropped,
    "fused-score-teaches": FusedScoreTeaches,
    "two-captions": TwoCaptions,
}


def main() -> None:
    """Train with the loss that the first argument names, and with the batches that it is for."""
    loss.MSALoss = TRIALS[sys.argv[1]]  # type: ignore[misc]
    if loss.MSALoss is TwoCaptions:
        data.detshuffle2 = EachTwice
    train(sys.argv[2:])


if __name__ == "__main__":
    main()
