"""Fusion over dates: what the image tower says of one place at several dates -> one vector (docs/method.md, 1.7).

Shapes: I samples, D dates, C channels of a vector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .towers import Images

_HEADS = 8
"""Of the attention over dates, where the channels allow."""


class PairFusion(nn.Module):
    """Two dates: their mean plus a small network of [z_1; z_2; z_2 - z_1].

    The network starts at zero, so that tower weights of single images start as they are; which date comes first matters
    to it alone.  Vectors of stages differ tenfold in length, hence the norm.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Linear(3 * channels, channels)
        self.last = nn.Linear(channels, channels)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, z: Tensor) -> Tensor:
        """(I, 2, C) -> (I, C)."""
        before, after = _normalised(z).unbind(dim=1)
        joined = torch.cat([before, after, after - before], dim=-1)
        fused: Tensor = z.mean(dim=1) + self.last(nn.functional.gelu(self.first(joined)))
        return fused


class SeriesFusion(nn.Module):
    """Many dates: their mean plus an attention of one learned query over them, which knows their positions.

    The output map starts at zero, as that of `PairFusion`.
    """

    def __init__(self, channels: int, dates: int) -> None:
        super().__init__()
        self.heads = math.gcd(channels, _HEADS)
        self.positions = nn.Parameter(torch.randn(dates, channels))  # as large as what they join
        self.query = nn.Parameter(torch.randn(channels))
        self.key = nn.Linear(channels, channels, bias=False)  # a bias would cancel in the softmax
        self.value = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, z: Tensor) -> Tensor:
        """(I, D, C) -> (I, C)."""
        placed = _normalised(z) + self.positions.to(z.dtype)
        shape = (*z.shape[:2], self.heads, -1)
        query = self.query.to(z.dtype).reshape(self.heads, -1)
        logits = (self.key(placed).reshape(shape) * query).sum(dim=-1) / math.sqrt(query.shape[-1])  # (I, D, H)
        read = (logits.softmax(dim=1)[..., None] * self.value(placed).reshape(shape)).sum(dim=1)
        fused: Tensor = z.mean(dim=1) + self.out(read.flatten(1))
        return fused


class DateFusion(nn.Module):
    """Fuses the tower's own feature and the pooled vectors of every scale over dates, each by weights of its own.

    Args:
        channels: C_s of each scale.
        embed_dim: channels of the tower's feature; None where nothing reads it.
        dates: of every sample, 2 or more.
    """

    def __init__(self, channels: Sequence[int], embed_dim: int | None, dates: int) -> None:
        super().__init__()
        self.dates = dates
        self.feature = None if embed_dim is None else _fusion(embed_dim, dates)
        self.scales = nn.ModuleList(_fusion(count, dates) for count in channels)

    def forward(self, feature: Tensor, pooled: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """What the tower says of I * D images, the dates of a sample in turn -> the same of I samples."""
        feature = self._by_sample(feature)
        fused = feature[:, -1] if self.feature is None else self.feature(feature)
        return fused, [fusion(self._by_sample(z)) for fusion, z in zip(self.scales, pooled, strict=True)]

    def _by_sample(self, x: Tensor) -> Tensor:
        """(I * D, C) -> (I, D, C)."""
        return x.reshape(-1, self.dates, x.shape[-1])


def flat_dates(image: Images, dates: int) -> Tensor:
    """Samples (I, D, 3, h, w) -> images (I * D, 3, h, w).

    Raises:
        ValueError: they are none of so many dates.
    """
    if not isinstance(image, Tensor) or image.dim() != 5 or image.shape[1] != dates:
        got = f"images {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(
            f"msa_cfg.dates: this model takes samples (I, {dates}, 3, h, w), {dates} images of a place in order of "
            f"date, all of one size; got {got}."
        )
    return image.flatten(0, 1)


def _fusion(channels: int, dates: int) -> nn.Module:
    return PairFusion(channels) if dates == 2 else SeriesFusion(channels, dates)


def _normalised(z: Tensor) -> Tensor:
    """Of mean 0 and variance 1 over the channels, in float32 or better and in the dtype of `z` again."""
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    return nn.functional.layer_norm(wide, z.shape[-1:]).to(z.dtype)
