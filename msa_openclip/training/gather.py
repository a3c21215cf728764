"""Gathers features and image sides from all ranks, and sends each rank the scores of its own rows, with gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Gather:
    """How this rank sees what the others computed.

    Args:
        rank: of this process.
        world_size: number of ranks; with one, nothing is sent.
        local_loss: each rank computes only its own rows and columns.
        with_grad: the features' gradients flow back to the ranks that they came from.
    """

    rank: int = 0
    world_size: int = 1
    local_loss: bool = False
    with_grad: bool = False

    def features(self, x: Tensor) -> Tensor:
        """Concatenate features or ids over ranks, (B, ...) -> (world_size B, ...), with ClipLoss's gradients."""
        if self.world_size == 1:
            return x
        if not x.is_floating_point():
            return _all_gather(x, self.world_size)
        if self.with_grad:
            return self.exactly(x)
        before, after = self.rank * len(x), (self.rank + 1) * len(x)
        gathered = _all_gather(x.detach(), self.world_size)
        if self.local_loss:
            return gathered
        # Only this rank's own part has a gradient here, and the mean over ranks would divide it by their number.
        own = scale_gradient(x, float(self.world_size))
        return torch.cat([gathered[:before], own, gathered[after:]])

    def exactly(self, x: Tensor) -> Tensor:
        """Concatenate over ranks, (B, ...) -> (world_size B, ...); each part's gradient is the sum of all ranks'."""
        if self.world_size == 1:
            return x
        if not x.numel():  # some backends take no empty tensors
            return x.new_empty(len(x) * self.world_size, *x.shape[1:])
        gathered: Tensor = _Concatenate.apply(x, self.world_size)
        return gathered

    def to_one_length(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) of this rank -> (B, L of the rank whose are longest), with -1 behind them."""
        if self.world_size == 1:
            return ids
        length = torch.tensor(ids.shape[1], device=ids.device)
        dist.all_reduce(length, op=dist.ReduceOp.MAX)
        return F.pad(ids, (0, int(length) - ids.shape[1]), value=-1)

    def own_rows(self, columns: Tensor) -> Tensor:
        """Scores (S, I, T) of all images with this rank's texts -> (S, I / world_size, world_size T), of its images
        with all texts."""
        if self.world_size == 1:
            return columns
        to_ranks = columns.reshape(len(columns), self.world_size, -1, columns.shape[2]).transpose(0, 1)
        from_ranks: Tensor = _Exchange.apply(to_ranks)  # (ranks, S, own images, a rank's texts)
        return from_ranks.permute(1, 2, 0, 3).flatten(2)


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """`x` itself, with its gradient multiplied by `factor`."""
    if factor == 1 or not x.requires_grad:
        return x
    return x.detach() + factor * (x - x.detach())


class _Concatenate(torch.autograd.Function):
    """Concatenation over ranks whose backward sums each part's gradient over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, world_size: int) -> Tensor:
        ctx.world_size = world_size
        return _all_gather(x, world_size)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        parts = gradient.reshape(ctx.world_size, -1, *gradient.shape[1:])
        if dist.get_backend() == "nccl":
            own = torch.empty_like(parts[0], memory_format=torch.contiguous_format)
            dist.reduce_scatter_tensor(own, parts.contiguous())
            return own, None
        # gloo has no reduce_scatter on every torch that we support; this sends as little.
        return _exchange(parts).sum(dim=0), None


class _Exchange(torch.autograd.Function):
    """Part r of every rank goes to rank r, (ranks, ...) -> (ranks, ...); gradients go back the same way."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor) -> Tensor:
        return _exchange(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _exchange(gradient)


def _exchange(parts: Tensor) -> Tensor:
    received = torch.empty_like(parts, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, parts.contiguous())
    return received


def _all_gather(x: Tensor, world_size: int) -> Tensor:
    gathered = x.new_empty(world_size, *x.shape)
    dist.all_gather(list(gathered.unbind()), x.contiguous())
    return gathered.flatten(0, 1)
