"""What single pairs of a batch weigh in InfoNCE terms, where some do not belong together (docs/explanation/methods.md).

Shapes: R rows (pairs of this rank, or of all), C columns, Q pairs remembered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import Loss
from .gather import Gather

SOFT_MARGIN, AMBIGUOUS, NOISY = 0.6, 0.8, 0.9
"""RRSITR's margin of pairs that are taken for wrong, and its factors of ambiguous and of wrong pairs."""


def rows_cross_entropy(logits: Tensor, positive: Tensor) -> Tensor:
    """(..., R) cross-entropy of the rows of (..., R, C) logits with the uniform distribution over (R, C) positives."""
    target = positive / positive.sum(dim=-1, keepdim=True)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return -(target * logits.log_softmax(dim=-1, dtype=wide)).sum(dim=-1)


class Contrast(NamedTuple):
    """Logits of both directions that one InfoNCE term contrasts."""

    weight: float
    per_image: Tensor
    """(R, C), images against texts."""
    per_text: Tensor
    """(R, C), the same pairs' texts against images."""

    def rows(self, positive: Tensor) -> Tensor:
        """(R,) cross-entropy of each pair, the mean of both directions."""
        return (rows_cross_entropy(self.per_image, positive) + rows_cross_entropy(self.per_text, positive)) / 2


def self_paced_loss(
    contrasts: Sequence[Contrast], positive: Tensor, pair: Tensor, logit_scale: Tensor, cfg: Loss
) -> Tensor:
    """RRSITR: easy pairs count most, those that look wrong are only held apart from their hardest negative.

    With l the loss of a pair over all terms and thresholds a = clean_below s, b = noisy_from s of logit scale s, a pair
    weighs v = cos(pi l / 2a) if l < a, 0.8 cos(pi l / 2b) if l < b; else it costs 0.9 of `robust_hinge`.

    Args:
        contrasts: the terms, with logits that are logit_scale times similarities.
        positive: (R, C) right answers.
        pair: (R,) own columns.
        logit_scale: s, without gradient.
        cfg: the thresholds.
    """
    total = sum(contrast.weight for contrast in contrasts)
    loss = sum(contrast.weight * contrast.rows(positive) for contrast in contrasts) / total
    hinge = sum(c.weight * robust_hinge(c, positive, pair, logit_scale) for c in contrasts) / total
    assert isinstance(loss, Tensor)
    clean, noisy = cfg.clean_below * logit_scale, cfg.noisy_from * logit_scale
    paced = torch.where(loss < clean, paced_value(loss, clean), AMBIGUOUS * paced_value(loss, noisy))
    return total * torch.where(loss < noisy, paced, NOISY * hinge).mean()


def paced_value(loss: Tensor, threshold: Tensor) -> Tensor:
    """min over v of v l + f(v), the self-paced objective whose minimiser is v = cos(pi l / 2b): 2b / pi sin(pi l / 2b).

    Its derivative is v, so that the weight needs no step of its own.  Losses beyond b have the value at b.
    """
    angle = (loss / threshold).clamp(max=1) * (math.pi / 2)
    return (2 / math.pi) * threshold * angle.sin()


def robust_hinge(contrast: Contrast, positive: Tensor, pair: Tensor, logit_scale: Tensor) -> Tensor:
    """(R,) hinge of both directions, averaged, on the hardest negative, with margin 0.6 (1 + relu(s_neg - s_pos))."""
    hinges = []
    for logits in (contrast.per_image, contrast.per_text):
        similarity = logits / logit_scale
        own = similarity.gather(1, pair[:, None]).squeeze(1)
        hardest = similarity.masked_fill(positive, -torch.inf).max(dim=1).values
        gap = hardest - own
        margin = SOFT_MARGIN * (1 + gap.detach().clamp(min=0))
        hinges.append((margin + gap).clamp(min=0))
    return (hinges[0] + hinges[1]) / 2


class Elimination:
    """EBAKER: leaves out pairs whose similarity is under a low quantile of those before them, after a warm-up.

    What it remembers lives as long as the process: a training that is resumed warms up again.
    """

    def __init__(self, cfg: Loss, accum_freq: int = 1) -> None:
        self.share, self.size, self.after = cfg.eliminated_share, cfg.eliminate_queue, cfg.eliminate_after
        self.accum_freq = accum_freq
        self.calls = 0
        self.seen = torch.empty(0)

    def weights(self, contrast: Contrast, pair: Tensor, logit_scale: Tensor, gather: Gather) -> Tensor:
        """(R,) 0 for pairs that are left out, else the factor by which a mean over all is one over those kept.

        Ranks remember the same pairs, those of all of them.
        """
        own = contrast.per_image.detach().gather(1, pair[:, None]).squeeze(1) / logit_scale
        everyone = gather.features(own) if gather.local_loss else own
        least = self._least(everyone)
        kept = (everyone >= least).sum().clamp(min=1)
        return (own >= least) * (len(everyone) / kept)

    def _least(self, everyone: Tensor) -> Tensor:
        """The least similarity that is kept; remembers the pairs of a step once, however many micro-batches it has."""
        step, self.calls = self.calls // self.accum_freq, self.calls + 1
        seen = self.seen.to(everyone)
        least = everyone.new_tensor(-torch.inf)
        if step >= self.after and len(seen):
            least = seen.kthvalue(1 + int(self.share * (len(seen) - 1))).values
        if self.calls % self.accum_freq == 0:
            self.seen = torch.cat([seen, everyone])[-self.size :]
        return least
