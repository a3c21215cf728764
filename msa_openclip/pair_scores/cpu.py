"""The pair stage's attention term on CPUs: cache-sized tiles of images x tokens, forwards and backwards.

A tile holds, for every head, the logits of some texts' tokens against some images, images innermost: both products
are large matrix products, and the softmax over tokens is sums of contiguous rows. Texts are visited in order of
length, so a tile pays for its own longest text only. The backward pass computes each tile again; nothing of size
I x T x H x N is ever kept. Where the processor multiplies bfloat16 itself, products of bfloat16 operands are computed
in it and everything between them in float32; elsewhere half precision is computed in float32. docs/explanation/speed.md
has the figure and the measurements behind the constants.

Shapes as in `pair_scores`; besides, L token rows of a tile (its texts x its longest text), J images of a block.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .cpu_tiles import LOG2_E, ImageBlock, Tile, Tiles, reach_of
from .operator import pair_operator

SAFE_EXPONENT = 64.0
"""A softmax whose powers of two stay within 2^-64 .. 2^64 needs no maximum subtracted; float32 reaches 2^127."""


def _forward(query: Tensor, readout: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """The attention term, (S, I, T) in float32 (float64 for float64)."""
    tiles = Tiles(query, readout, key, value, mask)
    scores = torch.zeros(tiles.scales, len(key), len(query), dtype=tiles.dtype)  # (S, T, I), texts by length
    weight_memory, read_memory = (tiles.scratch(tiles.tile_size) for _ in range(2))
    key_memory, value_memory = (tiles.scratch(tiles.rows_size, tiles.operands) for _ in range(2))
    for scale in range(tiles.scales):
        blocks = tiles.blocks(scale)
        for tile in tiles.tiles:
            k = tiles.gather(tiles.keys, scale, tile, key_memory)
            v = tiles.gather(tiles.values, scale, tile, value_memory)
            reach = reach_of(k)
            for block in blocks:
                safe = bool((reach * block.reach).amax() < SAFE_EXPONENT)
                weight = _weights(tiles, k, block, tile, safe=safe, out=weight_memory)
                total = weight.sum(dim=2)
                read = _product(tiles, v, block.readout, out=read_memory).view(weight.shape)
                scores[scale, tile.texts, block.images] = read.mul_(weight).sum(dim=2).div_(total).sum(dim=0)
    return scores[:, tiles.order.argsort()].transpose(1, 2).contiguous()


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
    tiles = Tiles(query, readout, key, value, mask)
    grad = grad.transpose(1, 2)[:, tiles.order].to(tiles.dtype)  # (S, T, I), texts by length
    d_query, d_readout = (_gradient(side, for_images, all_written=True) for side in (query, readout))
    every_token = len(query) > 0 and bool(mask.all())
    d_key, d_value = (_gradient(side, for_texts, all_written=every_token) for side in (key, value))
    weight_memory, read_memory, spare_memory = (tiles.scratch(tiles.tile_size) for _ in range(3))
    key_memory, value_memory = (tiles.scratch(tiles.rows_size, tiles.operands) for _ in range(2))
    dk_memory, dv_memory = (tiles.scratch(tiles.rows_size) for _ in range(2))
    for scale in range(tiles.scales):
        blocks = tiles.blocks(scale)
        d_images = [[torch.zeros_like(block.query, dtype=tiles.dtype) for _ in range(2)] for block in blocks]
        for tile in tiles.tiles:
            k = tiles.gather(tiles.keys, scale, tile, key_memory)
            v = tiles.gather(tiles.values, scale, tile, value_memory)
            dk, dv = (memory[: k.numel()].view(k.shape) for memory in (dk_memory, dv_memory))
            reach = reach_of(k)
            for block, (dq, du) in zip(blocks, d_images, strict=True):
                safe = bool((reach * block.reach).amax() < SAFE_EXPONENT)
                weight = _weights(tiles, k, block, tile, safe=safe, out=weight_memory)
                total = weight.sum(dim=2, keepdim=True)
                read = _product(tiles, v, block.readout, out=read_memory).view(weight.shape)
                spare = spare_memory[: weight.numel()].view(weight.shape)
                attended = torch.mul(weight, read, out=spare).sum(dim=2, keepdim=True).div_(total)
                # In place: d score / d read is the softmax, d score / d logit the softmax times (read - attended).
                weight.mul_(grad[scale, tile.texts, None, block.images] / total)
                d_logit, first = read.sub_(attended).mul_(weight), block is blocks[0]
                for d_tile, rows, side, d_rows, d_side in (
                    (d_logit, k, block.query, dk, dq),
                    (weight, v, block.readout, dv, du),
                ):
                    d_product = _as_operand(tiles, d_tile.flatten(1, 2))
                    if for_images:
                        _add_product(d_side, d_product.transpose(1, 2), rows)
                    if for_texts:
                        _add_product(d_rows, d_product, side, fresh=first)
            if for_texts and blocks:
                tiles.scatter(_unscaled(tiles, dk), d_key, scale, tile)
                tiles.scatter(dv, d_value, scale, tile)
        if for_images:
            for block, (dq, du) in zip(blocks, d_images, strict=True):
                d_query[block.images, scale], d_readout[block.images, scale] = dq.transpose(0, 1), du.transpose(0, 1)
    return d_query, d_readout, d_key, d_value


def _weights(tiles: Tiles, key: Tensor, block: ImageBlock, tile: Tile, *, safe: bool, out: Tensor) -> Tensor:
    """Softmax weights over tokens before their division, (H, texts, tokens, J)."""
    logits = _product(tiles, key, block.query, out=out)
    if not tiles.in_log2:
        logits.mul_(LOG2_E)
    if len(tile.padding):
        logits.index_fill_(1, tile.padding, -math.inf)
    logits = logits.view(len(logits), -1, tile.tokens, logits.shape[2])
    if not safe:
        logits.sub_(logits.amax(dim=2, keepdim=True))
    return logits.exp2_()


def _product(tiles: Tiles, tokens: Tensor, images: Tensor, *, out: Tensor) -> Tensor:
    """(H, L, d) x (H, J, d) -> (H, L, J), in the memory of `out`."""
    shape = (tokens.shape[0], tokens.shape[1], images.shape[1])
    out, images = out[: math.prod(shape)].view(shape), images.transpose(1, 2)
    if tokens.dtype == out.dtype:
        return torch.bmm(tokens, images, out=out)
    return out.copy_(torch.bmm(tokens, images, out=tiles.narrow_memory[: out.numel()].view(shape)))


def _as_operand(tiles: Tiles, tile: Tensor) -> Tensor:
    """A tile that is to be multiplied once more."""
    if tile.dtype == tiles.operands:
        return tile
    return tiles.narrow_memory[: tile.numel()].view(tile.shape).copy_(tile)


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, fresh: bool = False) -> None:
    """Add left @ right to `total`, or write it there where that is `fresh` memory."""
    if left.dtype == total.dtype:
        total.baddbmm_(left, right, beta=0 if fresh else 1)
    elif fresh:
        total.copy_(torch.bmm(left, right))
    else:
        total.add_(torch.bmm(left, right))


def _unscaled(tiles: Tiles, d_rows: Tensor) -> Tensor:
    """The keys' gradient, of what was added up with the queries as `Block` holds them."""
    return d_rows.div_(LOG2_E) if tiles.in_log2 else d_rows


def _gradient(side: Tensor, needed: bool, *, all_written: bool) -> Tensor:
    """Memory for a gradient; zeroed only where some of it would stay unwritten."""
    if not needed:
        return side.new_empty(0)
    return side.new_empty(side.shape) if all_written else side.new_zeros(side.shape)


tiled_attention = pair_operator("msa_openclip::pair_attention_cpu", _forward, _backward)
