"""Other methods' ways to make one global image feature of the scales (docs/explanation/methods.md).

Shapes: I images, S scales, C_s channels of scale s, E embed_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class DecoupledScales(nn.Module):
    """SSJDN's idea on pooled vectors: each scale says what the scales before it have not said, in both directions.

    With x_s = F_s z_s and salience a_s = sigmoid(A_s y_s): y_1 = x_1, y_s = x_s (1 - a_{s-1}) from shallow to deep, the
    same from deep to shallow, and the feature is the sum of all y.  The paper does this on maps; its exact units are
    not in its abstract, these are ours.
    """

    def __init__(self, channels: Sequence[int], embed_dim: int) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Linear(count, embed_dim) for count in channels)
        # The last scale of a direction suppresses none; with one scale there is nothing to suppress.
        self.salience = nn.ModuleList(nn.Linear(embed_dim, embed_dim) for _ in channels[1:])
        self.salience_back = nn.ModuleList(nn.Linear(embed_dim, embed_dim) for _ in channels[1:])

    def forward(self, feature: Tensor, pooled: Sequence[Tensor]) -> Tensor:
        """S of (I, C_s) -> (I, E); the tower's own feature is not used."""
        mapped = [linear(z) for linear, z in zip(self.project, pooled, strict=True)]
        return _suppressed_sum(mapped, self.salience) + _suppressed_sum(mapped[::-1], self.salience_back)


def _suppressed_sum(mapped: Sequence[Tensor], saliences: Sequence[nn.Module] | nn.ModuleList) -> Tensor:
    """x_1 .. x_S of (I, E) -> the sum of y_1 .. y_S."""
    said = total = mapped[0]
    for x, salience in zip(mapped[1:], saliences, strict=True):
        said = x * (1 - salience(said).sigmoid())
        total = total + said
    return total


class WeighedScales(nn.Module):
    """GaLR's dynamic fusion with the scales for local features: w_1 f + w_2 sum_s F_s z_s, weights by image.

    The weights are a softmax over a linear map of both; the paper's local features come from a detector and a graph
    network, which are not built here.
    """

    def __init__(self, channels: Sequence[int], embed_dim: int) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Linear(count, embed_dim) for count in channels)
        self.weigh = nn.Linear(2 * embed_dim, 2)

    def forward(self, feature: Tensor, pooled: Sequence[Tensor]) -> Tensor:
        """(I, E) and S of (I, C_s) -> (I, E)."""
        mapped = [linear(z) for linear, z in zip(self.project, pooled, strict=True)]
        local = torch.stack(mapped).sum(dim=0)
        weights: Tensor = self.weigh(torch.cat([feature, local], dim=1)).softmax(dim=1)
        return weights[:, :1] * feature + weights[:, 1:] * local
