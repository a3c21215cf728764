"""Scores of pairs that stand in the place of MSCMAT's, parameter-free, on the same two sides.

Their sides have no heads: what they compare is the image side's `gate` and the text side's `feature`.  Sources and
choices: docs/explanation/methods.md.
Shapes: I images, T texts, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .formula import ImageSide, TextSide


def gram_scores(images: ImageSide, texts: TextSide) -> Tensor:
    """EBAKER's local score: the root mean square cosine of all words with all parts of the image, (1, I, T).

    ||W P^T||_F^2 = <W^T W, P^T P>: words and parts never meet, their (D, D) Gram matrices do, in one product.

    Args:
        images: `gate` (I, 1, D D), the mean of p p^T over normalised parts p.
        texts: `feature` (T, D D), the mean of w w^T over normalised words w.
    """
    square = _products(images.gate[:, 0], texts.feature)
    return square.clamp(min=1e-12).sqrt()[None]  # the slope of a root at 0 is infinite


def gated_scores(images: ImageSide, texts: TextSide) -> Tensor:
    """AMFMN's score: the cosine of the image vector v with the text t gated by the image's g, <v, g t> / ||g t||.

    <v, g t> = <v g, t> and ||g t||^2 = <g^2, t^2>: no text is gated for each image.

    Args:
        images: `gate` (I, 2, D), v g with v normalised, and g^2.
        texts: `feature` (T, D).
    """
    product = _products(images.gate[:, 0], texts.feature)
    square = _products(images.gate[:, 1], texts.feature.square())
    return (product * square.clamp(min=1e-12).rsqrt())[None]


def without_heads(gate: Tensor) -> ImageSide:
    """An image side of `gate` (I, G, D) alone."""
    none = gate.new_zeros(len(gate), 1, 0, 1)
    return ImageSide(none, none, gate, gate.new_zeros(len(gate), 1))


def without_keys(feature: Tensor, mask: Tensor) -> TextSide:
    """A text side of `feature` (T, D) alone; `mask` (T, N) says which tokens it was made of."""
    none = feature.new_zeros(len(feature), 1, mask.shape[1], 0, 1)
    return TextSide(none, none, feature, mask)


def _products(images: Tensor, texts: Tensor) -> Tensor:
    """(I, D) and (T, D) -> (I, T), in float32 or better."""
    wide = torch.promote_types(images.dtype, torch.float32)
    with torch.autocast(images.device.type, enabled=False):
        return images.to(wide) @ texts.to(wide).T
