"""A picture of a training run: its loss terms and validation recalls by epoch."""

from __future__ import annotations

import json
import re
from pathlib import Path


def plot_run(run: Path, path: Path) -> None:
    """Draw what open_clip_train.main logged in LOGS/NAME: each loss term by step, mR of each ranking by epoch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    log = (run / "out.log").read_text(encoding="utf-8")
    lines = (run / "checkpoints" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    results = [json.loads(line) for line in lines]
    figure, (losses, recalls) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    epochs = [int(e) + int(n) / int(total) for e, n, total in re.findall(r"Train Epoch: (\d+) \[ *(\d+)/(\d+)", log)]
    for term in dict.fromkeys(re.findall(r" (\w+_loss): [0-9.eE+-]+ \(", log)):
        values = [float(value) for value in re.findall(rf" {term}: ([0-9.eE+-]+) \(", log)]
        losses.plot(epochs, values, label=term.lower())
    losses.set(xlabel="epoch", ylabel="weighted loss", title="training")
    for ranking in ("global", "match", "fused"):
        points = [(line["epoch"], line[key]) for line in results if (key := f"retrieval_{ranking}_mR") in line]
        if points:
            recalls.plot(*zip(*points, strict=True), marker="o", label=ranking)
    recalls.set(xlabel="epoch", ylabel="mR (%)", title="validation: mean recall by ranking")
    for axes in (losses, recalls):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
