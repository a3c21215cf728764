"""The pair stage's operands cut for a CPU: texts of like length into tiles of rows, images into blocks of columns.

Shapes as in `pair_scores`; besides, L token rows of a tile (its texts x its longest text), J images of a block.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

TILE_ROWS = 480
"""Token rows of a tile; one text may have more, and few images get up to MOST_ROWS, so that tiles stay worth a call."""
MOST_ROWS = 960
TILE_LOGITS = 122_880
"""Logits of a tile per head, i.e. 256 images at 480 rows: the two or three tiles in use stay in the cache."""
LOG2_E = 1 / math.log(2)


class Tile(NamedTuple):
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


class ImageBlock(NamedTuple):
    """Some images at one scale."""

    images: slice
    query: Tensor
    """(H, J, d); times log2 e where `Tiles.in_log2`."""
    readout: Tensor
    """(H, J, d)"""
    reach: Tensor
    """(H,): length of the longest query, times log2 e."""


class Tiles:
    """Both sides, cut; products are computed in `operands`, all else in `dtype`, float32 or wider."""

    def __init__(self, query: Tensor, readout: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> None:
        self.query, self.readout, self.mask = query, readout, mask
        self.keys, self.values = _rows(key), _rows(value)
        self.scales, self.tokens, self.heads, self.width = key.shape[1:]
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self.operands = query.dtype if query.dtype == torch.bfloat16 and multiplies_bfloat16() else self.dtype
        self.in_log2 = self.operands == self.dtype  # rounding queries to bfloat16 a second time would cost precision
        lengths = mask.sum(dim=1)
        self.order = lengths.argsort(stable=True)
        self.tiles = list(self._cut_texts(lengths))
        longest = max((len(tile.rows) // self.heads for tile in self.tiles), default=1)
        count = math.ceil(len(query) * longest / TILE_LOGITS) if len(query) else 0
        images = math.ceil(len(query) / count / 16) * 16 if count else 0
        self.slices = [slice(first, min(first + images, len(query))) for first in range(0, len(query), images or 1)]
        self.tile_size = self.heads * longest * min(images, len(query))
        self.rows_size = self.heads * longest * self.width
        self.narrow_memory = self.scratch(self.tile_size if self.operands != self.dtype else 0, self.operands)

    def _cut_texts(self, lengths: Tensor) -> list[Tile]:
        by_length = lengths[self.order].tolist()
        # Real tokens first: masks may have holes.
        position = self.mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        tiles: list[Tile] = []
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
            tiles.append(Tile(slice(first, last), tokens, rows, absent.flatten().nonzero().flatten(), real))
            first = last
        return tiles

    def scratch(self, size: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory for numbers of `dtype`, by default that of the sums."""
        return self.query.new_empty(size, dtype=dtype or self.dtype)

    def blocks(self, scale: int) -> list[ImageBlock]:
        """All images at one scale, contiguous by head."""
        blocks = []
        for images in self.slices:
            query, readout = self._by_head(self.query[images, scale]), self._by_head(self.readout[images, scale])
            reach = reach_of(query).mul_(LOG2_E)
            blocks.append(ImageBlock(images, query.mul_(LOG2_E) if self.in_log2 else query, readout, reach))
        return blocks

    def gather(self, rows: Tensor, scale: int, tile: Tile, scratch: Tensor) -> Tensor:
        """Keys or values of a tile, (H, L, d)."""
        index = self._index(scale, tile)
        out = scratch[: len(index) * self.width].view(len(index), self.width)
        if rows.dtype == out.dtype:
            torch.index_select(rows, 0, index, out=out)
        else:
            out.copy_(rows.index_select(0, index))
        return out.view(self.heads, -1, self.width)

    def scatter(self, new: Tensor, side: Tensor, scale: int, tile: Tile) -> None:
        """Write a tile's (H, L, d) to where `gather` takes it from; `side` is contiguous."""
        index, new = self._index(scale, tile), new.view(-1, self.width)
        if len(tile.padding):
            index, new = index[tile.real], new[tile.real]
        _rows(side).index_copy_(0, index, new.to(side.dtype))

    def _index(self, scale: int, tile: Tile) -> Tensor:
        return tile.rows + scale * self.tokens * self.heads

    def _by_head(self, side: Tensor) -> Tensor:
        return side.transpose(0, 1).to(self.operands, copy=True, memory_format=torch.contiguous_format)


def _rows(side: Tensor) -> Tensor:
    """(T, S, N, H, d) as (T S N H, d), without a copy where it is contiguous."""
    return side.reshape(-1, side.shape[-1])


def reach_of(vectors: Tensor) -> Tensor:
    """Length of the longest vector of each head."""
    wide = torch.promote_types(vectors.dtype, torch.float32)
    longest: Tensor = torch.linalg.vector_norm(vectors, dim=2, dtype=wide).amax(dim=1)
    return longest


@cache
def multiplies_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself (AVX-512 BF16, AMX); no where torch is too old to tell."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return supported is not None and bool(supported())
