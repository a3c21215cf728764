"""Plots a training run: its loss terms and validation recalls by epoch."""

from __future__ import annotations

import re
from pathlib import Path

from .run_selection import read_results

RANKINGS = ("global", "match", "fused")

Curves = dict[str, dict[float, float]]
"""By name: epoch -> value, in the order of the epochs."""


def read_curves(run: Path) -> tuple[Curves, Curves]:
    """The loss terms by step and mR of each ranking by epoch; of what a resumed run did twice, the second time.

    Args:
        run: folder that open_clip_train.main made, LOGS/NAME.
    """
    losses: Curves = {}
    for line in (run / "out.log").read_text(encoding="utf-8").splitlines():
        step = re.search(r"Train Epoch: (\d+) \[ *(\d+)/(\d+)", line)
        if step:
            epoch, seen, total = map(int, step.groups())
            for term, value in re.findall(r" (\w+_loss): ([0-9.eE+-]+) \(", line):
                losses.setdefault(term.lower(), {})[epoch + seen / total] = float(value)
    recalls: Curves = {}
    for row in read_results(run / "checkpoints" / "results.jsonl"):
        for ranking in RANKINGS:
            if f"retrieval_{ranking}_mR" in row:
                recalls.setdefault(ranking, {})[row["epoch"]] = row[f"retrieval_{ranking}_mR"]
    return _sorted(losses), _sorted(recalls)


def _sorted(curves: Curves) -> Curves:
    return {name: dict(sorted(points.items())) for name, points in curves.items()}


def plot_run(run: Path, path: Path) -> None:
    """Draw `read_curves` of a run to a file.

    Example:
        plot_run(Path("logs/NAME"), Path("training.png"))
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, curves, marker in zip(axes, read_curves(run), ("", "o"), strict=True):
        for name, points in curves.items():
            axis.plot(list(points), list(points.values()), marker=marker, label=name)
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set(xlabel="epoch", ylabel="weighted loss", title="training")
    axes[1].set(xlabel="epoch", ylabel="mR (%)", title="validation: mean recall by ranking")
    figure.savefig(path, dpi=120)
    plt.close(figure)
