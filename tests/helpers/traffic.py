"""What a rank sends through torch.distributed: the payload of each collective, by the fewest bytes it can take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

SENT: dict[str, Callable[[int, Any], float]] = {
    "all_gather": lambda ranks, args: (ranks - 1) * args[1].nbytes,
    "all_to_all_single": lambda ranks, args: (ranks - 1) / ranks * args[1].nbytes,
    "reduce_scatter_tensor": lambda ranks, args: (ranks - 1) / ranks * args[1].nbytes,
    "scatter": lambda ranks, args: (ranks - 1) * args[0].nbytes if args[2] == dist.get_rank() else 0,
    "all_reduce": lambda ranks, args: 2 * (ranks - 1) / ranks * args[0].nbytes,
}
"""Bytes a rank sends, of its arguments: an all_reduce is a reduce_scatter and an all_gather."""


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Bytes that this rank sends by each collective within the block, called from Python."""
    bytes_sent: Counter[str] = Counter()

    def counting(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            bytes_sent[name] += int(SENT[name](dist.get_world_size(), args))
            return collective(*args, **kwargs)

        return call

    with mock.patch.multiple(dist, **{name: counting(name, getattr(dist, name)) for name in SENT}):
        yield bytes_sent


def nbytes(*tensors: Tensor) -> int:
    """Bytes of the tensors together."""
    return sum(tensor.nbytes for tensor in tensors)
