"""Finds the best epoch of a run by validation, and sums up several seeds as mean and standard deviation.

The released code of several papers picks the epoch on the test set (docs/method.md, section 3).  Here the epoch is
chosen by what `open_clip_train.main --val-data` wrote to results.jsonl, and only that one checkpoint sees the test set.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..evaluation.run_parameters import RunError, read_parameters

METRIC = "retrieval_fused_mR"


@dataclass(frozen=True)
class BestEpoch:
    """The checkpoint to test."""

    run: str
    model: str
    epoch: int
    metric: str
    value: float
    checkpoint: str

    @property
    def spec(self) -> str:
        """As `loading.load` takes it."""
        return f"{self.model}={self.checkpoint}"


def best_epoch(run: str, metric: str = METRIC) -> BestEpoch:
    """The epoch of a run with the highest `metric`, the earliest of equals.

    Example:
        model = load(best_epoch("logs/NAME").spec)

    Args:
        run: folder that open_clip_train.main made, LOGS/NAME.
        metric: a key of results.jsonl; higher is better.
    Raises:
        RunError: no results, no such metric, or the best epoch was not saved.
    """
    folder = Path(run)
    results = folder / "checkpoints" / "results.jsonl"
    if not results.is_file():
        raise RunError(f"{results}: not found; give LOGS/NAME of a run trained with --val-data.")
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines() if line.strip()]
    values = {int(row["epoch"]): float(row[metric]) for row in rows if metric in row and "epoch" in row}
    if not values:
        known = sorted({key for row in rows for key in row})
        raise RunError(f"{results}: no epoch has {metric!r}; known are {', '.join(known) or 'none'}.")
    epoch = max(values, key=lambda number: (values[number], -number))
    checkpoint = folder / "checkpoints" / f"epoch_{epoch}.pt"
    if not checkpoint.is_file():
        raise RunError(f"{checkpoint}: not found, and epoch {epoch} is the best; train with --save-frequency 1.")
    return BestEpoch(run, read_parameters(folder)["model"], epoch, metric, values[epoch], str(checkpoint))


def mean_and_sd(rows: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation (of the sample, n - 1; 0 for one row) of every metric that all rows have."""
    shared = [key for key in rows[0] if all(key in row for row in rows)]
    return {
        key: (
            statistics.fmean(row[key] for row in rows),
            statistics.stdev([row[key] for row in rows]) if len(rows) > 1 else 0.0,
        )
        for key in shared
    }
