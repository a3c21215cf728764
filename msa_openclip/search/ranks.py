"""The ranks that build one index together: each shows that it lives, and rank 0 says which one it waits for."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..distributed import Peers
from .files import ImageIndexError, is_written

_BEAT_S = 5.0
_REPORT_S = 30.0
_log = logging.getLogger(__name__)


def _sign(root: Path, rank: int) -> Path:
    return root / f".rank-{rank}.alive"


@contextmanager
def working(root: Path, peers: Peers) -> Iterator[None]:
    """Touch a file for as long as this lasts, from a thread that dies with the process; rank 0 watches the others'."""
    if not peers.rank:
        yield
        return
    sign, ended = _sign(root, peers.rank), threading.Event()

    def beat() -> None:
        while not ended.is_set():
            sign.touch()
            ended.wait(_BEAT_S)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        sign.unlink(missing_ok=True)


def wait_for_ranks(root: Path, names: Sequence[str], peers: Peers, patience_s: float) -> None:
    """Until all segments are there, as long as the ranks that owe them live.

    Args:
        root: folder of the index.
        names: of the segments; rank r owes every one whose number is r modulo the number of ranks.
        peers: who waits, rank 0, and for how many.
        patience_s: how long a rank may show no sign of life.
    Raises:
        ImageIndexError: one shows none; the message names it.
    """
    start = reported = time.monotonic()
    last_sign: dict[int, tuple[int, float]] = {}
    missing = list(range(len(names)))
    while missing := [number for number in missing if not is_written(root, names[number])]:
        now = time.monotonic()
        owing = sorted({number % peers.world_size for number in missing})
        for rank in owing:
            stamp = _stamp(_sign(root, rank))
            if (
                last_sign.setdefault(rank, (stamp, start))[0] != stamp
            ):  # of clocks that may differ only the change counts
                last_sign[rank] = (stamp, now)
        silent = [rank for rank in owing if now - last_sign[rank][1] >= patience_s]
        if silent:
            raise ImageIndexError(
                f"{root}: {len(missing)} segments of other ranks are missing, and rank {silent[0]} of "
                f"{peers.world_size} has shown no sign of life for {patience_s:.0f} s; run the command again, what is "
                "finished is kept."
            )
        if now - reported >= _REPORT_S:
            reported = now
            _log.warning("%s: waiting for %d segments of ranks %s.", root, len(missing), ", ".join(map(str, owing)))
        time.sleep(0.05)


def _stamp(sign: Path) -> int:
    """When a rank last showed that it lives; 0 if it never did."""
    try:
        return sign.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
