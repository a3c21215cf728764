"""The processes that share a distributed run."""

from __future__ import annotations

from typing import NamedTuple


class Peers(NamedTuple):
    """The processes that share the work, as `torch.distributed` numbers them."""

    rank: int = 0
    world_size: int = 1
