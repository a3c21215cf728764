"""MSCMAT's learned maps, folded: pooled scale vectors -> ImageSide, text tokens -> TextSide.

The method is that of docs/method.md, sections 1.4 and 2.

Shapes: I images, T texts, S scales, C_s channels of scale s, N text tokens, D width, H heads, d = D / H.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Ranking, Score, check_heads
from ..pair_scores.formula import ImageSide, TextSide, match_logits
from ..pair_scores.similarities import gated_scores, gram_scores

IMAGE_SIDE_KEYS = tuple(f"match_image_{name}" for name in ImageSide._fields)
"""Keys of the dict that MSACLIP returns in training that hold the folded image side."""
TEXT_SIDE_KEYS = tuple(f"match_text_{name}" for name in TextSide._fields)
"""Keys of the dict that MSACLIP returns in training that hold the folded text side."""

MAX_LOGIT_SCALE = math.log(100)  # as CLIP clamps its own


class WideLayerNorm(nn.LayerNorm):
    """LayerNorm computed in float32 or better whatever the dtypes of input and weights; returns the input's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = _wide(self.weight), _wide(self.bias)
        return F.layer_norm(_wide(input), self.normalized_shape, weight, bias, self.eps).to(input.dtype)


class ScaleHead(nn.Module):
    """The learned maps of one scale: P_s, the attention and (w_s, b_s).

    `attention` and `match` hold parameters in their standard modules, so that initialisation, conversion to low
    precision and state dicts are the usual ones; `fold_projected` and `fold_text` apply them.
    """

    def __init__(self, channels: int, width: int, heads: int, score: Score) -> None:
        super().__init__()
        self.normalise_gate = score.gate == "normalised"
        self.project = nn.Linear(channels, width)
        self.attention = nn.MultiheadAttention(width, heads)
        self.match = nn.Linear(width, 1)
        # Its name keeps weight decay off it (open_clip's optimizer groups go by name).
        self.logit_scale = nn.Parameter(torch.tensor([-math.log(score.temperature)])) if score.temperature else None

    def convert_with_linear(self) -> None:
        """Convert the attention's in-projections to the precision of its out-projection.

        For precision `bf16` open_clip converts a model's linear layers, and in 3.x, no longer in 4.x, these with them.
        """
        for parameter in (self.attention.in_proj_weight, self.attention.in_proj_bias):
            parameter.data = parameter.data.to(self.attention.out_proj.weight.dtype)

    def fold_projected(self, projected: Tensor, norm: WideLayerNorm) -> ImageSide:
        """(I, D) projected vectors m -> q, u, g, r of this scale."""
        width, heads = self.attention.embed_dim, self.attention.num_heads
        normalised = norm(projected)
        query_weight, query_bias = self.attention.in_proj_weight[:width], self.attention.in_proj_bias[:width]
        query = F.linear(normalised, query_weight, query_bias) / math.sqrt(width // heads)
        gate = self.match.weight[0] * (normalised if self.normalise_gate else projected)
        if self.logit_scale is not None:
            gate = gate * self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp().to(gate.dtype)
        readout = gate @ self.attention.out_proj.weight  # O^T g
        bias = (_wide(gate) * _wide(self.attention.out_proj.bias)).sum(-1) + _wide(self.match.bias)  # r = c . g + b
        by_head = (-1, heads, width // heads)
        # Under autocast the gate is wider than what it is multiplied with; ranks send it, so it is not kept wider.
        return ImageSide(query.reshape(by_head), readout.reshape(by_head), gate.to(readout.dtype), bias)

    def fold_text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(T, N, D) normalised tokens y -> (T, N, H, d) keys and values of this scale."""
        width, heads = self.attention.embed_dim, self.attention.num_heads
        folded = F.linear(tokens, self.attention.in_proj_weight[width:], self.attention.in_proj_bias[width:])
        key, value = folded.reshape(*tokens.shape[:2], 2, heads, width // heads).unbind(2)
        return key, value


class MSCMAT(nn.Module):
    """Multi-scale cross-modal attention, one query an image and scale, folded into an image side and a text side.

    Args:
        channels: C_s of each scale, shallow to deep.
        token_width: width of the text tower's last hidden states; projected to `width` where it differs.
        feature_width: width of the global text feature (embed_dim); projected likewise.
        width: D.
        heads: H.
        score: form of the score, docs/method.md, section 1.4.
    Raises:
        ValueError: `width` is not divisible by `heads`.
    """

    def __init__(
        self, channels: Sequence[int], token_width: int, feature_width: int, width: int, heads: int, score: Score
    ) -> None:
        super().__init__()
        check_heads(width, heads)
        self.score = score
        self.project_token = nn.Identity() if token_width == width else nn.Linear(token_width, width)
        self.project_feature = nn.Identity() if feature_width == width else nn.Linear(feature_width, width, bias=False)
        self.ln_image = WideLayerNorm(width)
        self.ln_text = WideLayerNorm(width)
        self.scales = nn.ModuleList(ScaleHead(count, width, heads, score) for count in channels)

    @property
    def heads(self) -> list[ScaleHead]:
        """The learned maps of each scale, shallow to deep."""
        return cast("list[ScaleHead]", list(self.scales))

    def fold_image(self, pooled: Sequence[Tensor]) -> ImageSide:
        """Pooled vectors z_s, S tensors of (I, C_s) -> ImageSide."""
        return self.fold_projected(self.project_image(pooled))

    def project_image(self, pooled: Sequence[Tensor]) -> Tensor:
        """Pooled vectors z_s, S tensors of (I, C_s) -> projected vectors m (I, S, D), what an index keeps."""
        return torch.stack([head.project(z) for head, z in zip(self.heads, pooled, strict=True)], dim=1)

    @property
    def projected_shape(self) -> tuple[int, int]:
        """(S, D) of what an index keeps."""
        return len(self.scales), self.heads[0].project.out_features

    def fold_projected(self, projected: Tensor) -> ImageSide:
        """Projected vectors m (I, S, D) -> ImageSide, as `fold_image` makes it of the pooled ones."""
        sides = [head.fold_projected(projected[:, s], self.ln_image) for s, head in enumerate(self.heads)]
        return ImageSide(*(torch.stack(field, dim=1) for field in zip(*sides, strict=True)))

    def fold_text(self, tokens: Tensor, mask: Tensor, feature: Tensor) -> TextSide:
        """Tokens (T, N, C), their mask (T, N) and normalised global text features (T, E) -> TextSide."""
        normalised = self.ln_text(self.project_token(tokens))
        keys, values = zip(*(head.fold_text(normalised) for head in self.heads), strict=True)
        return TextSide(torch.stack(keys, dim=1), torch.stack(values, dim=1), self.project_feature(feature), mask)


def match_scores(images: ImageSide, texts: TextSide, score: Score) -> Tensor:
    """Match scores in the configured form, (S, I, T): logits, or their sigmoids as in the released code.

    Of the forms that stand in MSCMAT's place one score of all scales, (1, I, T).
    """
    if score.form == "gram":
        return gram_scores(images, texts)
    if score.form == "gated":
        return gated_scores(images, texts)
    logits = match_logits(images, texts)
    return logits.sigmoid() if score.form == "sigmoid" else logits


def fused_scores(cosine: Tensor, match: Tensor | None, logit_scale: Tensor, ranking: Ranking) -> Tensor:
    """Cosines (R, C) and match scores (S, R, C) -> fused scores (R, C) of `msa_cfg.ranking`."""
    fused = (logit_scale if ranking.global_weight is None else ranking.global_weight) * cosine
    return fused if match is None else fused + ranking.match_weight * match.mean(dim=0)


def _wide(x: Tensor) -> Tensor:
    """`x` in float32, or in its own dtype where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
