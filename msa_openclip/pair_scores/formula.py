"""MSCMAT's pair stage: parameter-free scores of all images against all texts at all scales (docs/method.md, section 2).

Shapes: I images, T texts, S scales, N text tokens, H heads, d width of a head, D = H d.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .cpu import tiled_attention
from .operator import PairAttention

TILED_FROM = 1 << 17
"""Logits (I x T x S x N x H) from which tiles pay for their set-up on a CPU, measured: about 90 pairs of full size."""


class ImageSide(NamedTuple):
    """What MSCMAT's fold leaves of each image; every field is batch-first."""

    query: Tensor
    """(I, S, H, d): q_h, the attention queries, already divided by sqrt(d)."""
    readout: Tensor
    """(I, S, H, d): u_h, what the attended value is read out with."""
    gate: Tensor
    """(I, S, D): g, what the global text feature is read out with."""
    bias: Tensor
    """(I, S): r, the part of the score that no text changes."""


class TextSide(NamedTuple):
    """What MSCMAT's fold leaves of each text; every field is batch-first."""

    key: Tensor
    """(T, S, N, H, d): k_nh, the attention keys."""
    value: Tensor
    """(T, S, N, H, d): v_nh, the attention values."""
    feature: Tensor
    """(T, D): t, the normalised global text feature."""
    mask: Tensor
    """(T, N): True where a token is attended to; a text without any such token attends to nothing."""


def match_logits(images: ImageSide, texts: TextSide) -> Tensor:
    """Score every image against every text at every scale (MSCMAT, docs/method.md, section 2).

        logit(s, i, t) = sum_h sum_n softmax_n(q_h(i) . k_nh(t)) (u_h(i) . v_nh(t)) + g(i) . t(t) + r(i)

    Products run in the dtype of the operands, the softmax and every sum after it in float32 or better.

    Args:
        images: folded image side, I images.
        texts: folded text side, T texts of N tokens.
    Returns:
        (S, I, T) logits, before any sigmoid, float32 (float64 for float64 operands).
    Raises:
        ValueError: the two sides were folded with different scales, heads or widths.
    """
    _check_sides(images, texts)
    return logits_with(_fastest_attention(images.query, texts.key), images, texts)


def logits_with(attention: PairAttention, images: ImageSide, texts: TextSide) -> Tensor:
    """`match_logits` by a chosen implementation of its attention term, e.g. `eager_attention`."""
    dtype = torch.promote_types(images.query.dtype, texts.key.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    with torch.autocast(images.query.device.type, enabled=False):
        query, readout, key, value = (side.to(dtype) for side in (images.query, images.readout, texts.key, texts.value))
        attended = attention(query, readout, key, value, texts.mask)
        gated = torch.matmul(images.gate.to(dtype).transpose(0, 1), texts.feature.to(dtype).T)  # (S, I, T)
        return attended + gated.to(wide) + images.bias.to(wide).T[:, :, None]


def eager_attention(query: Tensor, readout: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """The attention term as it is written, differentiable any number of times: (S, I, T).

    Args:
        query, readout: (I, S, H, d).
        key, value: (T, S, N, H, d).
        mask: (T, N), True where a token is attended to.
    """
    scales = zip(query.unbind(1), readout.unbind(1), key.unbind(1), value.unbind(1), strict=True)
    return torch.stack([_scale_attention(*scale, mask) for scale in scales])


def _scale_attention(query: Tensor, readout: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """One scale of `eager_attention`, (I, T); the only place where anything of size I x T x H x N exists."""
    wide = torch.promote_types(query.dtype, torch.float32)
    attention = torch.einsum("ihd,tnhd->ithn", query, key).to(wide)
    blocked = ~mask[:, None, :]  # (T, 1, N)
    # A finite floor and a second masking, not -inf: a text whose tokens are all masked then adds zero, not NaN.
    weight = attention.masked_fill(blocked, torch.finfo(wide).min).softmax(dim=-1).masked_fill(blocked, 0.0)
    read = torch.einsum("ihd,tnhd->ithn", readout, value).to(wide)
    return (weight * read).sum(dim=(-2, -1))


def _fastest_attention(query: Tensor, key: Tensor) -> PairAttention:
    """The implementation for this device, precision and size; all agree to rounding."""
    if query.device.type == "cpu" and query.shape[0] * key.shape[:-1].numel() >= TILED_FROM:
        return tiled_attention
    if query.device.type == "cuda" and (fused := _fused_attention()) and fused.takes(query, key):
        kernel: PairAttention = fused.triton_attention
        return kernel
    return eager_attention


@cache
def _fused_attention() -> ModuleType | None:
    """The Triton kernels, imported when first wanted; None where this torch came without Triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(".triton_kernels", __package__)


def _check_sides(images: ImageSide, texts: TextSide) -> None:
    _, scales, heads, width = images.query.shape
    text_scales, text_heads, text_width = texts.key.shape[1], texts.key.shape[3], texts.key.shape[4]
    if (scales, heads, width) != (text_scales, text_heads, text_width):
        raise ValueError(
            f"image side has {scales} scales, {heads} heads of width {width}; text side has {text_scales} scales, "
            f"{text_heads} heads of width {text_width}. Fold both sides with the same model."
        )
