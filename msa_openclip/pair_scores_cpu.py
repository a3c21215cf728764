"""The pair stage's attention term on CPUs: cache-sized tiles of images x tokens, forwards and backwards.

A tile holds, for every head, the logits of some texts' tokens against some images, images innermost: both products
are large matrix products, and the softmax over tokens is sums of contiguous rows. Texts are visited in order of
length, so a tile pays for its own longest text only. The backward pass computes each tile again; nothing of size
I x T x H x N is ever kept. docs/speed.md has the figure and the measurements behind the constants.

Shapes as in `pair_scores`; besides, L token rows of a tile (its texts x its longest text), J images of a tile.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .pair_operator import pair_operator

TILE_ROWS = 240
"""Token rows of a tile; one text may have more, and few images get up to MOST_ROWS, so that tiles stay worth a call."""
MOST_ROWS = 960
TILE_LOGITS = 61_440
"""Logits of a tile per head, i.e. 256 images at 240 rows: the two or three tiles in use stay in the cache."""
SAFE_EXPONENT = 64.0
"""A softmax whose powers of two stay within 2^-64 .. 2^64 needs no maximum subtracted; float32 reaches 2^127."""
LOG2_E = 1 / math.log(2)


class _Tile(NamedTuple):
    """Texts of like length."""

    texts: slice
    """Which ones, in the order of length."""
    tokens: int
    """Length of the longest one."""
    rows: Tensor
    """(H L,): where each head's token stands among the rows of a scale; a text's first token stands in for padding."""
    padding: Tensor
    """Which of L are padding."""
    real: Tensor
    """Which of H L are not."""


class _Block(NamedTuple):
    """Some images at one scale."""

    images: slice
    query: Tensor
    """(H, J, d), in units of log 2."""
    readout: Tensor
    """(H, J, d)"""
    reach: Tensor
    """(H,): length of the longest query."""


class _Work:
    """Both sides cut into tiles and blocks, and the scratch memory they are computed in."""

    def __init__(self, query: Tensor, readout: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> None:
        self.query, self.readout, self.mask = query, readout, mask
        self.keys, self.values = _rows(key), _rows(value)
        self.scales, self.tokens, self.heads, self.width = key.shape[1:]
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        lengths = mask.sum(dim=1)
        self.order = lengths.argsort(stable=True)
        self.tiles = list(self._cut_texts(lengths))
        longest = max((len(tile.rows) // self.heads for tile in self.tiles), default=1)
        count = math.ceil(len(query) * longest / TILE_LOGITS) if len(query) else 0
        images = math.ceil(len(query) / count / 16) * 16 if count else 0
        self.slices = [slice(first, min(first + images, len(query))) for first in range(0, len(query), images or 1)]
        self.tile_size = self.heads * longest * min(images, len(query))
        self.rows_size = self.heads * longest * self.width

    def _cut_texts(self, lengths: Tensor) -> list[_Tile]:
        by_length = lengths[self.order].tolist()
        # Real tokens first: masks may have holes.
        position = self.mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        tiles: list[_Tile] = []
        first = by_length.count(0)  # Nothing to attend to adds nothing.
        most_rows = max(TILE_ROWS, min(MOST_ROWS, TILE_LOGITS // max(1, len(self.query))))
        while first < len(by_length):
            last = first + 1
            while last < len(by_length) and (last + 1 - first) * by_length[last] <= most_rows:
                last += 1
            tokens = int(by_length[last - 1])
            texts = self.order[first:last, None]
            absent = torch.arange(tokens) >= lengths[texts]  # (texts, tokens)
            token = position[texts, torch.arange(tokens).where(~absent, 0)]
            rows = texts * self.scales * self.tokens + token
            rows = (rows.flatten() * self.heads + torch.arange(self.heads)[:, None]).flatten()
            real = (~absent).flatten().repeat(self.heads).nonzero().flatten()
            tiles.append(_Tile(slice(first, last), tokens, rows, absent.flatten().nonzero().flatten(), real))
            first = last
        return tiles

    def scratch(self, size: int) -> Tensor:
        return self.query.new_empty(size, dtype=self.dtype)

    def blocks(self, scale: int) -> list[_Block]:
        """All images at one scale, contiguous by head."""
        blocks = []
        for images in self.slices:
            query = self._by_head(self.query[images, scale]).mul_(LOG2_E)
            readout = self._by_head(self.readout[images, scale])
            blocks.append(_Block(images, query, readout, _reach(query)))
        return blocks

    def _by_head(self, side: Tensor) -> Tensor:
        return side.transpose(0, 1).to(self.dtype, copy=True, memory_format=torch.contiguous_format)

    def gather(self, rows: Tensor, scale: int, tile: _Tile, scratch: Tensor) -> Tensor:
        """Keys or values of a tile, (H, L, d)."""
        index = self.index(scale, tile)
        out = scratch[: len(index) * self.width].view(len(index), self.width)
        if rows.dtype == out.dtype:
            torch.index_select(rows, 0, index, out=out)
        else:
            out.copy_(rows.index_select(0, index))
        return out.view(self.heads, -1, self.width)

    def scatter(self, rows: Tensor, scale: int, tile: _Tile, new: Tensor) -> None:
        """What `gather` took, written back."""
        index, new = self.index(scale, tile), new.view(-1, self.width)
        if len(tile.padding):
            index, new = index[tile.real], new[tile.real]
        rows.index_copy_(0, index, new.to(rows.dtype))

    def index(self, scale: int, tile: _Tile) -> Tensor:
        return tile.rows + scale * self.tokens * self.heads


def _rows(side: Tensor) -> Tensor:
    """(T, S, N, H, d) as (T S N H, d), without a copy where it is contiguous."""
    return side.reshape(-1, side.shape[-1])


def _reach(vectors: Tensor) -> Tensor:
    """Length of the longest vector of each head."""
    longest: Tensor = torch.linalg.vector_norm(vectors, dim=2).amax(dim=1)
    return longest


def _weights(key: Tensor, block: _Block, tile: _Tile, *, safe: bool, out: Tensor) -> Tensor:
    """Softmax weights over tokens before their division, (H, texts, tokens, J)."""
    logits = _product(key, block.query, out=out)
    if len(tile.padding):
        logits.index_fill_(1, tile.padding, -math.inf)
    logits = logits.view(len(logits), -1, tile.tokens, logits.shape[2])
    if not safe:
        logits.sub_(logits.amax(dim=2, keepdim=True))
    return logits.exp2_()


def _product(tokens: Tensor, images: Tensor, *, out: Tensor) -> Tensor:
    """(H, L, d) x (H, J, d) -> (H, L, J), in the memory of `out`."""
    shape = (tokens.shape[0], tokens.shape[1], images.shape[1])
    return torch.bmm(tokens, images.transpose(1, 2), out=out[: math.prod(shape)].view(shape))


def _forward(query: Tensor, readout: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """The attention term, (S, I, T) in float32 (float64 for float64)."""
    work = _Work(query, readout, key, value, mask)
    scores = torch.zeros(work.scales, len(key), len(query), dtype=work.dtype)  # (S, T, I), texts by length
    weight_memory, read_memory = (work.scratch(work.tile_size) for _ in range(2))
    key_memory, value_memory = (work.scratch(work.rows_size) for _ in range(2))
    for scale in range(work.scales):
        blocks = work.blocks(scale)
        for tile in work.tiles:
            k = work.gather(work.keys, scale, tile, key_memory)
            v = work.gather(work.values, scale, tile, value_memory)
            reach = _reach(k)
            for block in blocks:
                safe = bool((reach * block.reach).amax() < SAFE_EXPONENT)
                weight = _weights(k, block, tile, safe=safe, out=weight_memory)
                total = weight.sum(dim=2)
                read = _product(v, block.readout, out=read_memory).view(weight.shape)
                scores[scale, tile.texts, block.images] = read.mul_(weight).sum(dim=2).div_(total).sum(dim=0)
    return scores[:, work.order.argsort()].transpose(1, 2).contiguous()


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
    work = _Work(query, readout, key, value, mask)
    grad = grad.transpose(1, 2)[:, work.order].to(work.dtype)  # (S, T, I), texts by length
    d_query, d_readout = (_gradient(side, for_images, all_written=True) for side in (query, readout))
    d_key, d_value = (_gradient(side, for_texts, all_written=bool(mask.all())) for side in (key, value))
    weight_memory, read_memory, spare_memory = (work.scratch(work.tile_size) for _ in range(3))
    key_memory, value_memory, dk_memory, dv_memory = (work.scratch(work.rows_size) for _ in range(4))
    for scale in range(work.scales):
        blocks = work.blocks(scale)
        d_images = [(torch.zeros_like(block.query), torch.zeros_like(block.readout)) for block in blocks]
        for tile in work.tiles:
            k = work.gather(work.keys, scale, tile, key_memory)
            v = work.gather(work.values, scale, tile, value_memory)
            dk, dv = (memory[: k.numel()].view(k.shape).zero_() for memory in (dk_memory, dv_memory))
            reach = _reach(k)
            for block, (dq, du) in zip(blocks, d_images, strict=True):
                safe = bool((reach * block.reach).amax() < SAFE_EXPONENT)
                weight = _weights(k, block, tile, safe=safe, out=weight_memory)
                total = weight.sum(dim=2, keepdim=True)
                read = _product(v, block.readout, out=read_memory).view(weight.shape)
                spare = spare_memory[: weight.numel()].view(weight.shape)
                attended = torch.mul(weight, read, out=spare).sum(dim=2, keepdim=True).div_(total)
                # In place: d score / d read is the softmax, d score / d logit the softmax times (read - attended).
                weight.mul_(grad[scale, tile.texts, None, block.images] / total)
                d_read, d_logit = weight.flatten(1, 2), read.sub_(attended).mul_(weight).flatten(1, 2)
                if for_images:
                    dq.baddbmm_(d_logit.transpose(1, 2), k)
                    du.baddbmm_(d_read.transpose(1, 2), v)
                if for_texts:
                    dk.baddbmm_(d_logit, block.query)
                    dv.baddbmm_(d_read, block.readout)
            if for_texts:
                work.scatter(_rows(d_key), scale, tile, dk.div_(LOG2_E))
                work.scatter(_rows(d_value), scale, tile, dv)
        if for_images:
            for block, (dq, du) in zip(blocks, d_images, strict=True):
                d_query[block.images, scale], d_readout[block.images, scale] = dq.transpose(0, 1), du.transpose(0, 1)
    return d_query, d_readout, d_key, d_value


def _gradient(side: Tensor, needed: bool, *, all_written: bool) -> Tensor:
    """Memory for a gradient; zeroed only where some of it would stay unwritten."""
    if not needed:
        return side.new_empty(0)
    return side.new_empty(side.shape) if all_written else side.new_zeros(side.shape)


tiled_attention = pair_operator("msa_openclip::pair_attention_cpu", _forward, _backward)
