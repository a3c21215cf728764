"""The learned maps of the scores that can stand in MSCMAT's place, folded into the same two sides.

Shapes: I images, T texts, S scales, C_s channels of scale s, N text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import MSACfg
from ..pair_scores.formula import ImageSide, TextSide
from ..pair_scores.similarities import without_heads, without_keys
from .mscmat import MSCMAT


class GramScore(nn.Module):
    """EBAKER's local score (`gram_scores`) of all words with an image's parts, here its pooled vectors of all scales.

    The paper's parts are patches; pooled vectors are what an index and cached features keep of an image.
    """

    heads = ()

    def __init__(self, channels: Sequence[int], token_width: int, width: int) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Linear(count, width) for count in channels)
        self.project_token = nn.Linear(token_width, width)
        self.scales = (0,)  # one score, of all scales

    def fold_image(self, pooled: Sequence[Tensor]) -> ImageSide:
        """Pooled vectors z_s, S tensors of (I, C_s) -> ImageSide."""
        return self.fold_projected(self.project_image(pooled))

    def project_image(self, pooled: Sequence[Tensor]) -> Tensor:
        """Pooled vectors z_s, S tensors of (I, C_s) -> parts (I, S, D), what an index keeps."""
        return torch.stack([linear(z) for linear, z in zip(self.project, pooled, strict=True)], dim=1)

    @property
    def projected_shape(self) -> tuple[int, int]:
        """(S, D) of what an index keeps."""
        return len(self.project), cast("nn.Linear", self.project[0]).out_features

    def fold_projected(self, projected: Tensor) -> ImageSide:
        """Parts (I, S, D) -> ImageSide."""
        parts = F.normalize(projected, dim=-1)
        return without_heads(_gram(parts)[:, None] / parts.shape[1])

    def fold_text(self, tokens: Tensor, mask: Tensor, feature: Tensor) -> TextSide:
        """Tokens (T, N, C) and their mask (T, N) -> TextSide; a text without tokens scores 0."""
        words = F.normalize(self.project_token(tokens), dim=-1) * mask[..., None]
        return without_keys(_gram(words) / mask.sum(dim=1, keepdim=True).clamp(min=1), mask)


class GatedScore(nn.Module):
    """AMFMN's score (`gated_scores`): the image says which channels of the text count.

    v = sum_s P_s z_s and the gate g = sigmoid(G v); the paper's v is the output of its image tower.
    """

    heads = ()

    def __init__(self, channels: Sequence[int], feature_width: int, width: int) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Linear(count, width) for count in channels)
        self.gate = nn.Linear(width, width)
        self.project_feature = nn.Identity() if feature_width == width else nn.Linear(feature_width, width, bias=False)
        self.scales = (0,)

    def fold_image(self, pooled: Sequence[Tensor]) -> ImageSide:
        """Pooled vectors z_s, S tensors of (I, C_s) -> ImageSide."""
        return self.fold_projected(self.project_image(pooled))

    def project_image(self, pooled: Sequence[Tensor]) -> Tensor:
        """Pooled vectors z_s, S tensors of (I, C_s) -> v (I, 1, D), what an index keeps."""
        mapped = [linear(z) for linear, z in zip(self.project, pooled, strict=True)]
        return torch.stack(mapped, dim=1).sum(dim=1, keepdim=True)

    @property
    def projected_shape(self) -> tuple[int, int]:
        """(1, D) of what an index keeps."""
        return 1, self.gate.in_features

    def fold_projected(self, projected: Tensor) -> ImageSide:
        """v (I, 1, D) -> ImageSide."""
        gate = self.gate(projected).sigmoid()
        return without_heads(torch.cat([F.normalize(projected, dim=-1) * gate, gate.square()], dim=1))

    def fold_text(self, tokens: Tensor, mask: Tensor, feature: Tensor) -> TextSide:
        """Normalised global text features (T, E) -> TextSide; the tokens take no part."""
        return without_keys(self.project_feature(feature), mask)


PairScore = MSCMAT | GramScore | GatedScore


def build_pair_score(cfg: MSACfg, channels: Sequence[int], token_width: int, feature_width: int) -> PairScore:
    """The score that `msa_cfg.score.form` names, MSCMAT as a rule."""
    width = cfg.width or feature_width
    if cfg.score.form == "gram":
        return GramScore(channels, token_width, width)
    if cfg.score.form == "gated":
        return GatedScore(channels, feature_width, width)
    return MSCMAT(channels, token_width, feature_width, width, cfg.heads, cfg.score)


def _gram(vectors: Tensor) -> Tensor:
    """(B, N, D) -> (B, D D), sum over n of x x^T."""
    return (vectors.transpose(1, 2) @ vectors).flatten(1)
