"""The results of evaluated models: collected, printed as a table, and as plain data for JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..evaluation.eval_set import EvalSet
from ..evaluation.evaluate import Evaluation
from ..evaluation.metrics import Ties
from ..evaluation.scorer import main_ranking
from ..shards.storage import store
from .examples import Examples

COLUMNS = ("i2t_R@1", "i2t_R@5", "i2t_R@10", "t2i_R@1", "t2i_R@5", "t2i_R@10", "mR")
TEMPLATES = Path(__file__).parent / "templates"
TIES = {"expected": "in expectation over their orders", "pessimistic": "against the model"}
"""How equal scores count, in words."""
CURVE_CUTOFFS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50)


@dataclass
class ModelResult:
    """Everything reported of one model."""

    spec: str
    seconds: float
    ties: Ties
    metrics: dict[str, dict[str, float]]
    """By ranking: the field's protocol."""
    merged: dict[str, dict[str, float]]
    """By ranking: identical captions as one query."""
    intervals: dict[str, dict[str, tuple[float, float]]]
    """By ranking: 95 % intervals over images; empty if not asked for."""
    by_class: dict[str, dict[str, float]]
    """By class: metrics of the main ranking."""
    curves: dict[str, dict[str, list[float]]]
    """By ranking: recall at CURVE_CUTOFFS, `i2t` and `t2i`."""
    parts: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """By part of the captions, by ranking: metrics with these captions alone."""
    examples: Examples | None = None
    """For the page."""

    def rankings(self, protocol: str) -> dict[str, dict[str, float]]:
        """Metrics by ranking, of `metrics`, `merged` or a part of the captions."""
        retrievals: dict[str, dict[str, float]] = self.parts.get(protocol) or getattr(self, protocol)
        return retrievals

    @property
    def main_ranking(self) -> str:
        """The ranking by which the model is judged: fused where there is one."""
        return main_ranking(self.metrics)

    @classmethod
    def of(cls, spec: str, evaluation: Evaluation, seconds: float, *, ties: Ties, bootstrap: int) -> ModelResult:
        """Sum up an evaluation; `bootstrap` is the number of samples, 0 for no intervals."""
        shown = [name for name in evaluation.per_caption if "_scale" not in name]
        main = main_ranking(shown)
        names, classes = evaluation.data.classes
        by_class = evaluation.per_caption[main].by_class(classes, ties) if names else {}
        return cls(
            spec,
            seconds,
            ties,
            evaluation.summaries(ties),
            evaluation.summaries(ties, merged=True),
            {name: evaluation.per_caption[name].bootstrap(ties, bootstrap) for name in shown} if bootstrap else {},
            {names[label]: metrics for label, metrics in by_class.items() if label >= 0},
            {name: _curves(evaluation, name, ties) for name in shown},
            {
                part: {name: retrieval.summary(ties) for name, retrieval in rankings.items()}
                for part, rankings in evaluation.parts.items()
            },
        )


def _curves(evaluation: Evaluation, ranking: str, ties: Ties) -> dict[str, list[float]]:
    summary = evaluation.per_caption[ranking].summary(ties, CURVE_CUTOFFS)
    return {way: [summary[f"{way}_R@{k}"] for k in CURVE_CUTOFFS] for way in ("i2t", "t2i")}


def table(data: EvalSet, results: Sequence[ModelResult], *, scales: bool = False) -> str:
    """Text for a terminal: a line for each model and ranking."""
    lines = [describe(data), ""]
    rows: list[tuple[str, ...]] = [("model", "ranking", *(name.replace("_", " ") for name in COLUMNS), "95 % of mR")]
    for result in results:
        for part, rankings in {"": result.metrics, **result.parts}.items():
            for ranking, metrics in rankings.items():
                if "_scale" not in ranking or scales:
                    interval = None if part else result.intervals.get(ranking, {}).get("mR")
                    span = f"{interval[0]:.2f} to {interval[1]:.2f}" if interval else ""
                    label = f"{ranking}, {part}" if part else ranking
                    rows.append((result.spec, label, *(f"{metrics[name]:.2f}" for name in COLUMNS), span))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [f"{cell:{'<' if n < 2 else '>'}{widths[n]}}" for n, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def describe(data: EvalSet) -> str:
    """One line about the set."""
    parts = (f", {count} {name}" for name, count in captions_by_part(data).items())
    counts = f"{len(data.images)} images, {data.captions} captions, {len(data.texts)} of them distinct"
    return f"{data.source}: {counts}{''.join(parts)}"


def captions_by_part(data: EvalSet) -> dict[str, int]:
    """Number of captions, copies included, in each part that is rated alone."""
    return {name: int(data.per_caption.column_copies[part].sum()) for name, part in data.parts.items()}


def write_json(path: str, content: Any) -> None:
    """Write plain data, indented, in one step."""
    store.write_text(path, json.dumps(content, indent=2) + "\n")


def as_dict(data: EvalSet, results: Sequence[ModelResult], parsed: argparse.Namespace | None = None) -> dict[str, Any]:
    """Plain data for JSON: all rankings in both protocols, intervals, classes, and how they were computed."""
    import open_clip

    from .. import __version__

    return {
        "data": {
            "source": data.source,
            "images": len(data.images),
            "captions": data.captions,
            "distinct_captions": len(data.texts),
            **({"captions_by_part": captions_by_part(data)} if data.parts else {}),
        },
        "options": {key: value for key, value in vars(parsed).items() if key != "models"} if parsed else {},
        "versions": {"msa_openclip": __version__, "open_clip": open_clip.__version__, "torch": torch.__version__},
        "models": [
            {
                "model": result.spec,
                "seconds": round(result.seconds, 3),
                "ties": result.ties,
                "metrics": result.metrics,
                "metrics_merged_captions": result.merged,
                "intervals_95": result.intervals,
                "by_class": result.by_class,
                **({"metrics_by_part": result.parts} if result.parts else {}),
                "recall_curves": {"cutoffs": CURVE_CUTOFFS, **result.curves},
            }
            for result in results
        ],
    }
