"""Batch-first tensors of all ranks, joined, with the gradients that open_clip's ClipLoss gives its features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .pair_scores import TextSide


@dataclass(frozen=True, kw_only=True)
class Gather:
    """How this rank sees what the others computed.

    Args:
        rank: of this process.
        world_size: number of ranks; with one, nothing is sent.
        local_loss: each rank computes only its own rows and columns.
        with_grad: gradients flow back to the ranks that a tensor came from.
    """

    rank: int = 0
    world_size: int = 1
    local_loss: bool = False
    with_grad: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """Concatenate a batch-first tensor over ranks, (B, ...) -> (world_size B, ...)."""
        if self.world_size == 1:
            return x
        if not x.is_floating_point():
            return torch.cat(_all_gather(x.to(torch.int64), self.world_size)).to(x.dtype)
        if self.with_grad:
            gathered_with_grad: Tensor = _GatherWithGrad.apply(x, self.rank, self.world_size)
            return gathered_with_grad
        gathered = _all_gather(x.detach(), self.world_size)
        if not self.local_loss:
            # Only this rank's own part has a gradient here, and the mean over ranks would divide it by their number.
            gathered[self.rank] = scale_gradient(x, float(self.world_size))
        return torch.cat(gathered)

    def without_common_padding(self, texts: TextSide) -> TextSide:
        """Without the token positions after the longest text of all ranks: keys and values are most of what is sent."""
        if self.world_size == 1:
            return texts
        used = texts.mask.any(dim=0)
        length = (used * torch.arange(1, len(used) + 1, device=used.device)).max()
        dist.all_reduce(length, op=dist.ReduceOp.MAX)
        end = max(int(length), 1)
        return texts._replace(key=texts.key[:, :, :end], value=texts.value[:, :, :end], mask=texts.mask[:, :end])


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """`x` itself, with its gradient multiplied by `factor`."""
    if factor == 1 or not x.requires_grad:
        return x
    return x.detach() + factor * (x - x.detach())


class _GatherWithGrad(torch.autograd.Function):
    """Concatenation over ranks whose backward sums each part's gradient over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rank: int, world_size: int) -> Tensor:
        ctx.own = slice(rank * len(x), (rank + 1) * len(x))
        return torch.cat(_all_gather(x, world_size))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)  # gloo has no reduce_scatter on every torch version that we support
        return gradient[ctx.own], None, None


def _all_gather(x: Tensor, world_size: int) -> list[Tensor]:
    x = x.contiguous()
    gathered = [torch.empty_like(x) for _ in range(world_size)]
    dist.all_gather(gathered, x)
    return gathered
