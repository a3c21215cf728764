# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"
"""The pair stage's attention term on GPUs: fused Triton kernels, forwards and backwards, deterministic.

A program holds the logits of some images against the tokens of a group of texts for one head: two small products, the
softmax over each text's tokens, the weighted sum. The forward kernel adds the heads up and writes scores only; the
backward kernels compute the same tile again, once for the image side (all texts in turn) and once for the text side
(all images in turn), so that nothing of size I x T x H x N reaches memory and no sum depends on the order of threads.

Texts are sorted by length and visited in three ranges, up to a quarter, up to half and up to all of the padded length:
a group of short texts is a group of more texts, not of more padding. Lengths stay on the device, so that nothing
waits for it and CUDA graphs can hold it all. docs/explanation/speed.md has a figure.

Shapes as in `pair_scores`; besides, J images of a program, `TEXTS` texts of `TOKENS` tokens each, d padded to `WIDTH`.
"""

# No `from __future__ import annotations`: the interpreter of Triton 3.1 does not know tl.constexpr by a string.
import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .operator import pair_operator

MAX_TOKENS = 256
"""Longest text, padding included, whose logits fit a program's registers."""
MAX_WIDTH = 128
"""Widest head that does."""


INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Triton's interpreter, which runs the kernels on CPUs in tests, has no products of bfloat16."""


class Launch(NamedTuple):
    """How large a program is; `benchmarks/pair_gpu.py --tune` compares them."""

    images: int
    columns: int
    """Token columns of a group of texts, texts x padded length."""
    warps: int
    stages: int


LAUNCHES = {2: Launch(128, 128, 8, 2), 4: Launch(32, 64, 4, 2)}
"""By bytes of an element, for data-centre GPUs (Hopper, Ampere)."""
SMALL_LAUNCHES = {2: Launch(64, 64, 4, 2), 4: Launch(16, 32, 4, 2)}
"""The same for GPUs with less shared memory than the former ask for."""
LARGE_SHARED_MEMORY = 160 * 1024


@triton.jit
def _load(pointers, inside):
    """Operands of the products; zero where there are none."""
    values = tl.load(pointers, mask=inside, other=0.0)
    if INTERPRETED:
        values = values.to(tl.float32)
    return values


@triton.jit
def _load_images(side, images, n_images, scale, head, scales, heads, d, WIDTH: tl.constexpr):
    """Rows of an image side (I, S, H, d) for one scale and head: values, their addresses, which exist."""
    lane = tl.arange(0, WIDTH)
    address = ((images.to(tl.int64) * scales + scale) * heads + head)[:, None] * d + lane[None, :]
    inside = (images < n_images)[:, None] & (lane < d)[None, :]
    return _load(side + address, inside), address, inside


@triton.jit
def _locate_tokens(
    rows, lengths, first, stop, scale, head, tokens, heads, d,
    TEXTS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Addresses of a group's tokens in a text side (T, S, N, H, d), and which columns are real tokens."""
    column = tl.arange(0, TEXTS * TOKENS)
    slot = first + column // TOKENS
    token = column % TOKENS
    real = token < tl.load(lengths + slot, mask=slot < stop, other=0)
    row = tl.load(rows + slot.to(tl.int64) * tokens + token, mask=real, other=0) + scale * tokens
    lane = tl.arange(0, WIDTH)
    return (row * heads + head)[:, None] * d + lane[None, :], real[:, None] & (lane < d)[None, :], real


@triton.jit
def _attend(q, u, k, v, real, TEXTS: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr):
    """Softmax weights before division and what is read, (J, TEXTS, TOKENS); attended values and totals, (J, TEXTS)."""
    logit = tl.dot(q, tl.trans(k), input_precision=PRECISION) * 1.4426950408889634
    logit = tl.reshape(tl.where(real[None, :], logit, float("-inf")), (q.shape[0], TEXTS, TOKENS))
    read = tl.reshape(tl.dot(u, tl.trans(v), input_precision=PRECISION), (q.shape[0], TEXTS, TOKENS))
    # Floors for the slots past a range's last text: the sum of a real text is 1 or more.
    top = tl.maximum(tl.max(logit, axis=2), -3.0e38)
    weight = tl.exp2(logit - top[:, :, None])
    total = tl.maximum(tl.sum(weight, axis=2), 1.0)
    return weight, read, tl.sum(weight * read, axis=2) / total, total


@triton.jit
def _differentiate(
    q, u, k, v, real, grad, images, n_images, n_texts, first, stop, scale,
    TEXTS: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile's logits and of what is read, (J, TEXTS x TOKENS), in the precision of the products."""
    weight, read, attended, total = _attend(q, u, k, v, real, TEXTS, TOKENS, PRECISION)
    slot = first + tl.arange(0, TEXTS)
    inside = (images < n_images)[:, None] & (slot < stop)[None, :]
    address = (scale * n_texts + slot).to(tl.int64)[None, :] * n_images + images[:, None]
    upstream = tl.load(grad + address, mask=inside, other=0.0) / total
    d_read = weight * upstream[:, :, None]
    d_logit = d_read * (read - attended[:, :, None])
    d_logit = tl.reshape(d_logit, (q.shape[0], TEXTS * TOKENS))
    d_read = tl.reshape(d_read, (q.shape[0], TEXTS * TOKENS))
    return d_logit.to(q.dtype), d_read.to(q.dtype)


@triton.jit
def _score_group(
    query, readout, key, value, rows, lengths, scores, block, first, stop, scale,
    n_images, n_texts, scales, tokens, heads, d,
    IMAGES: tl.constexpr, TEXTS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of one block of images against one group of texts, all heads."""
    images = block * IMAGES + tl.arange(0, IMAGES)
    score = tl.zeros((IMAGES, TEXTS), dtype=tl.float32)
    for head in range(heads):
        q, _, _ = _load_images(query, images, n_images, scale, head, scales, heads, d, WIDTH)
        u, _, _ = _load_images(readout, images, n_images, scale, head, scales, heads, d, WIDTH)
        address, inside, real = _locate_tokens(
            rows, lengths, first, stop, scale, head, tokens, heads, d, TEXTS, TOKENS, WIDTH
        )
        k = _load(key + address, inside)
        v = _load(value + address, inside)
        _, _, attended, _ = _attend(q, u, k, v, real, TEXTS, TOKENS, PRECISION)
        score += attended
    slot = first + tl.arange(0, TEXTS)
    target = (scale * n_texts + slot).to(tl.int64)[None, :] * n_images + images[:, None]
    tl.store(scores + target, score, mask=(images < n_images)[:, None] & (slot < stop)[None, :])


@triton.jit
def _forward_kernel(
    query, readout, key, value, rows, lengths, bounds, scores,
    n_images, n_texts, scales, tokens, heads, d,
    IMAGES: tl.constexpr, TEXTS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores (S, T, I), texts by length; one program for a block of images, a group of texts, a scale."""
    blocks = tl.cdiv(n_images, IMAGES)
    block, group, scale = tl.program_id(0) % blocks, tl.program_id(0) // blocks, tl.program_id(1)
    start, quarter, half = tl.load(bounds), tl.load(bounds + 1), tl.load(bounds + 2)
    quarter_groups = tl.cdiv(quarter - start, TEXTS * 4)
    half_groups = quarter_groups + tl.cdiv(half - quarter, TEXTS * 2)
    if group < quarter_groups:
        first = start + group * TEXTS * 4
        _score_group(
            query, readout, key, value, rows, lengths, scores, block, first, quarter, scale,
            n_images, n_texts, scales, tokens, heads, d, IMAGES, TEXTS * 4, TOKENS // 4, WIDTH, PRECISION,
        )  # fmt: skip
    elif group < half_groups:
        first = quarter + (group - quarter_groups) * TEXTS * 2
        _score_group(
            query, readout, key, value, rows, lengths, scores, block, first, half, scale,
            n_images, n_texts, scales, tokens, heads, d, IMAGES, TEXTS * 2, TOKENS // 2, WIDTH, PRECISION,
        )  # fmt: skip
    else:
        first = half + (group - half_groups) * TEXTS
        if first < n_texts:
            _score_group(
                query, readout, key, value, rows, lengths, scores, block, first, n_texts, scale,
                n_images, n_texts, scales, tokens, heads, d, IMAGES, TEXTS, TOKENS, WIDTH, PRECISION,
            )  # fmt: skip


@triton.jit
def _add_texts(
    dq, du, q, u, key, value, rows, lengths, grad, images, first, stop, scale, head,
    n_images, n_texts, tokens, heads, d,
    TEXTS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the texts of one range add to the gradients of some images."""
    for start in range(first, stop, TEXTS):
        address, inside, real = _locate_tokens(
            rows, lengths, start, stop, scale, head, tokens, heads, d, TEXTS, TOKENS, WIDTH
        )
        k = _load(key + address, inside)
        v = _load(value + address, inside)
        d_logit, d_read = _differentiate(
            q, u, k, v, real, grad, images, n_images, n_texts, start, stop, scale, TEXTS, TOKENS, PRECISION
        )
        dq += tl.dot(d_logit, k, input_precision=PRECISION)
        du += tl.dot(d_read, v, input_precision=PRECISION)
    return dq, du


@triton.jit
def _image_kernel(
    grad, query, readout, key, value, rows, lengths, bounds, d_query, d_readout,
    n_images, n_texts, scales, tokens, heads, d,
    IMAGES: tl.constexpr, TEXTS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the image side; one program for a block of images, a scale, a head, over all texts."""
    images = tl.program_id(0) * IMAGES + tl.arange(0, IMAGES)
    scale, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    q, address, inside = _load_images(query, images, n_images, scale, head, scales, heads, d, WIDTH)
    u, _, _ = _load_images(readout, images, n_images, scale, head, scales, heads, d, WIDTH)
    start, quarter, half = tl.load(bounds), tl.load(bounds + 1), tl.load(bounds + 2)
    dq, du = tl.zeros((IMAGES, WIDTH), dtype=tl.float32), tl.zeros((IMAGES, WIDTH), dtype=tl.float32)
    dq, du = _add_texts(
        dq, du, q, u, key, value, rows, lengths, grad, images, start, quarter, scale, head,
        n_images, n_texts, tokens, heads, d, TEXTS * 4, TOKENS // 4, WIDTH, PRECISION,
    )  # fmt: skip
    dq, du = _add_texts(
        dq, du, q, u, key, value, rows, lengths, grad, images, quarter, half, scale, head,
        n_images, n_texts, tokens, heads, d, TEXTS * 2, TOKENS // 2, WIDTH, PRECISION,
    )  # fmt: skip
    dq, du = _add_texts(
        dq, du, q, u, key, value, rows, lengths, grad, images, half, n_texts, scale, head,
        n_images, n_texts, tokens, heads, d, TEXTS, TOKENS, WIDTH, PRECISION,
    )  # fmt: skip
    tl.store(d_query + address, dq, mask=inside)
    tl.store(d_readout + address, du, mask=inside)


@triton.jit
def _differentiate_group(
    grad, query, readout, key, value, rows, lengths, d_key, d_value, first, stop, scale, head,
    n_images, n_texts, scales, tokens, heads, d,
    IMAGES: tl.constexpr, TEXTS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one group of texts, over all images."""
    address, inside, real = _locate_tokens(
        rows, lengths, first, stop, scale, head, tokens, heads, d, TEXTS, TOKENS, WIDTH
    )
    k = _load(key + address, inside)
    v = _load(value + address, inside)
    dk = tl.zeros((TEXTS * TOKENS, WIDTH), dtype=tl.float32)
    dv = tl.zeros((TEXTS * TOKENS, WIDTH), dtype=tl.float32)
    for start in range(0, n_images, IMAGES):
        images = start + tl.arange(0, IMAGES)
        q, _, _ = _load_images(query, images, n_images, scale, head, scales, heads, d, WIDTH)
        u, _, _ = _load_images(readout, images, n_images, scale, head, scales, heads, d, WIDTH)
        d_logit, d_read = _differentiate(
            q, u, k, v, real, grad, images, n_images, n_texts, first, stop, scale, TEXTS, TOKENS, PRECISION
        )
        dk += tl.dot(tl.trans(d_logit), q, input_precision=PRECISION)
        dv += tl.dot(tl.trans(d_read), u, input_precision=PRECISION)
    tl.store(d_key + address, dk, mask=inside)
    tl.store(d_value + address, dv, mask=inside)


@triton.jit
def _text_kernel(
    grad, query, readout, key, value, rows, lengths, bounds, d_key, d_value,
    n_images, n_texts, scales, tokens, heads, d,
    IMAGES: tl.constexpr, TEXTS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the text side; one program for a group of texts, a scale, a head, over all images."""
    group, scale, head = tl.program_id(0), tl.program_id(1) // heads, tl.program_id(1) % heads
    start, quarter, half = tl.load(bounds), tl.load(bounds + 1), tl.load(bounds + 2)
    quarter_groups = tl.cdiv(quarter - start, TEXTS * 4)
    half_groups = quarter_groups + tl.cdiv(half - quarter, TEXTS * 2)
    if group < quarter_groups:
        first = start + group * TEXTS * 4
        _differentiate_group(
            grad, query, readout, key, value, rows, lengths, d_key, d_value, first, quarter, scale, head,
            n_images, n_texts, scales, tokens, heads, d, IMAGES, TEXTS * 4, TOKENS // 4, WIDTH, PRECISION,
        )  # fmt: skip
    elif group < half_groups:
        first = quarter + (group - quarter_groups) * TEXTS * 2
        _differentiate_group(
            grad, query, readout, key, value, rows, lengths, d_key, d_value, first, half, scale, head,
            n_images, n_texts, scales, tokens, heads, d, IMAGES, TEXTS * 2, TOKENS // 2, WIDTH, PRECISION,
        )  # fmt: skip
    else:
        first = half + (group - half_groups) * TEXTS
        if first < n_texts:
            _differentiate_group(
                grad, query, readout, key, value, rows, lengths, d_key, d_value, first, n_texts, scale, head,
                n_images, n_texts, scales, tokens, heads, d, IMAGES, TEXTS, TOKENS, WIDTH, PRECISION,
            )  # fmt: skip


class _Texts(NamedTuple):
    """The order in which texts are visited, on their device."""

    order: Tensor
    """(T,): texts by length."""
    rows: Tensor
    """(T, N): t S N + n of each text's real tokens first, texts by length."""
    lengths: Tensor
    """(T,): rising."""
    bounds: Tensor
    """(3,): how many texts are empty, have up to a quarter and up to half of the padded length."""


def _by_length(mask: Tensor, scales: int, padded: int) -> _Texts:
    lengths, order = mask.sum(dim=1, dtype=torch.int32).sort(stable=True)
    token = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[order]
    rows = order[:, None] * (scales * mask.shape[1]) + token
    bounds = torch.stack([(lengths <= length).sum(dtype=torch.int32) for length in (0, padded // 4, padded // 2)])
    return _Texts(order, rows, lengths, bounds)


def _launches(device: torch.device) -> dict[int, Launch]:
    if device.type != "cuda":
        return LAUNCHES
    properties: Any = torch.cuda.get_device_properties(device)  # its stubs lack the field
    shared_bytes: int = properties.shared_memory_per_block_optin
    return LAUNCHES if shared_bytes >= LARGE_SHARED_MEMORY else SMALL_LAUNCHES


def _sizes(query: Tensor, key: Tensor) -> tuple[int, dict[str, Any]]:
    """Number of groups of texts at most, and the kernels' arguments after the tensors."""
    n_texts, scales, tokens, heads, d = key.shape
    launch = _launches(query.device)[query.element_size()]
    padded = max(4, triton.next_power_of_2(tokens))
    texts = max(1, launch.columns // padded)
    # The plain product of float32 operands, or TF32 where torch.set_float32_matmul_precision allows it.
    exact = query.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    arguments = {
        "n_images": len(query),
        "n_texts": n_texts,
        "scales": scales,
        "tokens": tokens,
        "heads": heads,
        "d": d,
        # At least 16, which the products ask for; long texts leave room for fewer images.
        "IMAGES": max(16, launch.images * launch.columns // (texts * padded)),
        "TEXTS": texts,
        "TOKENS": padded,
        "WIDTH": max(16, triton.next_power_of_2(d)),
        "PRECISION": "ieee" if exact else "tf32",
        "num_warps": launch.warps,
        "num_stages": launch.stages,
    }
    return triton.cdiv(n_texts, texts) + 2, arguments


def takes(query: Tensor, key: Tensor) -> bool:
    """Whether these operands fit the kernels: no float64, no text or head too large for a program."""
    fits = key.shape[2] <= MAX_TOKENS and key.shape[4] <= MAX_WIDTH
    return fits and query.dtype == key.dtype and query.dtype in (torch.bfloat16, torch.float16, torch.float32)


def _forward(query: Tensor, readout: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """The attention term, (S, I, T) in float32."""
    groups, arguments = _sizes(query, key)
    texts = _by_length(mask, key.shape[1], arguments["TOKENS"])
    scores = query.new_zeros(key.shape[1], len(key), len(query), dtype=torch.float32)
    sides = (side.contiguous() for side in (query, readout, key, value))
    if scores.numel():
        grid = (triton.cdiv(len(query), arguments["IMAGES"]) * groups, key.shape[1])
        _forward_kernel[grid](*sides, texts.rows, texts.lengths, texts.bounds, scores, **arguments)
    return scores[:, texts.order.argsort()].transpose(1, 2).contiguous()


def _backward(
    grad: Tensor,
    query: Tensor,
    readout: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    for_images: bool,
    for_texts: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, readout, key and value; empty for a side that needs none."""
    groups, arguments = _sizes(query, key)
    texts = _by_length(mask, key.shape[1], arguments["TOKENS"])
    by_length = grad.transpose(1, 2)[:, texts.order].contiguous()  # (S, T, I)
    sides = [side.contiguous() for side in (query, readout, key, value)]
    inputs = (by_length, *sides, texts.rows, texts.lengths, texts.bounds)
    pairs_of_scale_and_head = key.shape[1] * key.shape[3]
    d_query, d_readout = (query.new_zeros(query.shape if for_images else 0) for _ in range(2))
    d_key, d_value = (key.new_zeros(key.shape if for_texts else 0) for _ in range(2))
    if for_images and grad.numel():
        grid = (triton.cdiv(len(query), arguments["IMAGES"]), pairs_of_scale_and_head)
        _image_kernel[grid](*inputs, d_query, d_readout, **arguments)
    if for_texts and grad.numel():
        _text_kernel[(groups, pairs_of_scale_and_head)](*inputs, d_key, d_value, **arguments)
    return d_query, d_readout, d_key, d_value


triton_attention = pair_operator("msa_openclip::pair_attention_triton", _forward, _backward)
