"""A kernel of the pair stage's attention term as a torch operator: autograd, torch.compile and clear refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PairAttention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""query, readout (I, S, H, d), key, value (T, S, N, H, d), mask (T, N) -> (S, I, T), the sum over heads and tokens.

In float32, or float64 for float64 operands; the four operands share a dtype, mask is True where a token is attended to.
"""

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
PairBackward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, bool], Gradients]
"""Upstream gradient (S, I, T), the forward's arguments, whether the images' and the texts' gradients are needed
-> the gradients of query, readout, key and value, contiguous; empty for a side that needs none."""


def pair_operator(name: str, forward: PairAttention, backward: PairBackward) -> PairAttention:
    """Register `forward` as the operator `name`, differentiable once by `backward` and opaque to torch.compile.

    Both must be typed functions of tensors alone that keep no reference to what they return (torch.library.custom_op).
    """
    forward_operator = torch.library.custom_op(name, forward, mutates_args=())
    backward_operator = torch.library.custom_op(f"{name}_backward", backward, mutates_args=())
    forward_operator.register_fake(_fake_forward)
    backward_operator.register_fake(_fake_backward)

    def differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, readout, key, value = ctx.needs_input_grad[:4]
        for_images, for_texts = query or readout, key or value
        gradients = backward_operator(grad, *ctx.saved_tensors, for_images, for_texts)
        needed = (for_images, for_images, for_texts, for_texts)
        return (*(gradient if wanted else None for gradient, wanted in zip(gradients, needed, strict=True)), None)

    forward_operator.register_autograd(differentiate, setup_context=_save)
    backward_operator.register_autograd(_refuse_second_derivative)
    return forward_operator


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _refuse_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError(
        "match_logits is differentiable once at this size and on this device. For second derivatives, call "
        "pair_scores.logits_with(pair_scores.eager_attention, images, texts), which keeps every intermediate."
    )


def _fake_forward(query: Tensor, readout: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(key.shape[1], query.shape[0], key.shape[0], dtype=wide)


def _fake_backward(
    grad: Tensor,
    query: Tensor,
    readout: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    for_images: bool,
    for_texts: bool,
) -> Gradients:
    images, texts = (query, readout), (key, value)
    d_query, d_readout = (side.new_empty(side.shape if for_images else (0,)) for side in images)
    d_key, d_value = (side.new_empty(side.shape if for_texts else (0,)) for side in texts)
    return d_query, d_readout, d_key, d_value
