"""The processes that share a distributed run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple


class Peers(NamedTuple):
    """The processes that share the work, as `torch.distributed` numbers them."""

    rank: int = 0
    world_size: int = 1


def unwrapped(model: Any) -> Any:
    """The model inside DistributedDataParallel and torch.compile."""
    while inner := getattr(model, "module", None) or getattr(model, "_orig_mod", None):
        model = inner
    return model


class PeerError(RuntimeError):
    """Another rank could not do its share; the message says which one, and why."""


@contextmanager
def failing_together(peers: Peers) -> Iterator[None]:
    """What is raised in here on one rank is raised on all of them, at the end of it.

    Else the others would wait for the one that failed in their next collective, until a timeout ends the run.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    said: list[Any] = [None if failure is None else f"{type(failure).__name__}: {failure}"] * peers.world_size
    if peers.world_size > 1:
        import torch.distributed as dist

        dist.all_gather_object(said, said[0])
    if failure is not None:
        raise failure
    for rank, text in enumerate(said):
        if text is not None:
            raise PeerError(f"rank {rank}: {text}")
