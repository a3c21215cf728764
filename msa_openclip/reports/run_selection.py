"""Finds the best epoch of a run by validation, and sums up several seeds as mean and standard deviation.

The released code of several papers picks the epoch on the test set (docs/method.md, section 3).  Here the epoch is
chosen by what `open_clip_train.main --val-data` wrote to results.jsonl, and only that one checkpoint sees the test set.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.checkpoint_files import is_whole
from ..data.small_files import FileProblem, parse_json, read_text
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
    rows = read_results(results)
    measured = {row["epoch"]: row[metric] for row in rows if metric in row and "epoch" in row}
    odd = [(epoch, value) for epoch, value in measured.items() if type(epoch) is not int or not is_number(value)]
    if odd:
        raise RunError(f"{results}: epoch {odd[0][0]!r} has {metric} {odd[0][1]!r}, which is no number.")
    if not measured:
        known = sorted({key for row in rows for key in row})
        raise RunError(f"{results}: no epoch has {metric!r}; known are {', '.join(known) or 'none'}.")
    values = {epoch: float(value) for epoch, value in measured.items() if math.isfinite(value)}
    if not values:
        raise RunError(f"{results}: {metric!r} is not finite in any epoch; the training diverged.")
    epoch = max(values, key=lambda number: (values[number], -number))
    checkpoint = folder / "checkpoints" / f"epoch_{epoch}.pt"
    if not checkpoint.is_file():
        raise RunError(f"{checkpoint}: not found, and epoch {epoch} is the best; train with --save-frequency 1.")
    return BestEpoch(run, read_parameters(folder)["model"], epoch, metric, values[epoch], str(checkpoint))


def require_whole(best: BestEpoch) -> None:
    """Raise RunError if a kill left the checkpoint of the best epoch half-written."""
    if not is_whole(best.checkpoint):
        raise RunError(
            f"{best.checkpoint}: cut short, and epoch {best.epoch} is the best; copy it again, or train on from the "
            "epoch before (--resume)."
        )


def read_results(path: Path) -> list[dict[str, Any]]:
    """The lines of a results.jsonl, each an object.

    Raises:
        RunError: a line is something else; the message names it.
    """
    rows: list[dict[str, Any]] = []
    try:
        for number, line in enumerate(read_text(path).splitlines(), start=1):
            if not line.strip():
                continue
            row = parse_json(line, f"{path}: line {number}")
            if not isinstance(row, dict) or isinstance(row.get("epoch"), (list, dict)):
                raise FileProblem(f"{path}: line {number}: no record of an epoch; remove the line.")
            rows.append(row)
    except FileProblem as error:
        raise RunError(str(error)) from error
    return rows


def is_number(value: object) -> bool:
    """Whether a value out of JSON is a number that can be compared, NaN and infinity included."""
    return type(value) is float or (type(value) is int and abs(value) < 1 << 53)


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
