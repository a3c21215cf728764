"""The main job end to end: captions -> shards -> open_clip_train.main -> best epoch by val -> test recalls and plots.

    python examples/quickstart.py --out out/demo                                       synthetic aerial scenes
    python examples/quickstart.py --out out/ucm --captions dataset_ucm.json --images images --epochs 30

Every command that it runs is printed as you would type it.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

from msa_openclip.run_selection import best_epoch

MODEL = "MSA-ViT-Ti"


def main() -> None:
    options = parse_arguments()
    out: Path = options.out
    if (out / "logs").exists():
        sys.exit(f"{out} holds an earlier run; remove it or name another folder with --out.")
    shards, run = out / "shards", out / "logs" / "run"
    build_shards(options, shards)
    test = pattern(shards, "test")
    evaluation = ("--shards", test, "--bootstrap", 0, "--workers", 1)
    command("msa_openclip.cli", "eval", f"{MODEL}=untrained", *evaluation, "--json", out / "before.json")
    command(
        "open_clip_train.main", "--model", MODEL, "--device", "cpu",
        "--precision", "fp32",  # amp, open_clip's default, is some ten times slower on most CPUs
        "--train-data", pattern(shards, "train"), "--val-data", pattern(shards, "val"), "--dataset-type", "webdataset",
        "--epochs", options.epochs, "--batch-size", 64, "--workers", 1, "--lr", options.lr, "--warmup", 30,
        "--aug-cfg", "scale=(0.9, 1.0)", "--save-frequency", 1, "--log-every-n-steps", 5,
        "--logs", out / "logs", "--name", run.name,
    )  # fmt: skip
    best = best_epoch(str(run))  # by the recalls on val; the test images are looked at once
    after = ("--json", out / "after.json", "--html", out / "retrieval.html")
    command("msa_openclip.cli", "eval", f"{MODEL}={best.checkpoint}", *evaluation, *after)
    plot_run(run, out / "training.png")
    print(f"\nLoss and recalls: {out / 'training.png'}\nExample retrievals: {out / 'retrieval.html'}")
    print(f"The model in Python: open_clip.create_model({MODEL!r}, pretrained={best.checkpoint!r})")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for all results (out/demo)")
    parser.add_argument("--captions", help="caption file, e.g. dataset_ucm.json (default: synthetic scenes)")
    parser.add_argument("--images", help="folder of its images")
    parser.add_argument("--scenes", type=int, default=1600, help="synthetic training scenes (1600)")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the images (10)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (1e-3)")
    return parser.parse_args()


def build_shards(options: argparse.Namespace, shards: Path) -> None:
    if options.captions:
        images = ["--images", options.images] if options.images else []
        command("msa_openclip.cli", "shards", "build", options.captions, shards, *images)
    else:
        held_out = max(options.scenes // 8, 16)
        counts = ["--train", options.scenes, "--val", held_out, "--test", held_out]
        command("msa_openclip.cli", "shards", "synthesize", shards, *counts, "--shards", "image")


def pattern(shards: Path, split: str) -> str:
    """Brace pattern of a split's shards."""
    last = sorted(shards.glob(f"{split}-*.tar"))[-1].stem.split("-")[-1]
    return f"{shards}/{split}-{{{'0' * len(last)}..{last}}}.tar"


def command(module: str, *arguments: object) -> None:
    """Print and run `python -m module arguments`; ends this script where it fails."""
    name = "msa-openclip" if module == "msa_openclip.cli" else f"python -m {module}"
    words = [str(argument) for argument in arguments]
    print(f"\n$ {name} {shlex.join(words)}", flush=True)
    done = subprocess.run([sys.executable, "-m", module, *words], check=False)
    if done.returncode:
        sys.exit(f"{name} ended with code {done.returncode}.")


def plot_run(run: Path, path: Path) -> None:
    """Loss terms by step and recalls by epoch of a run of open_clip_train.main."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    log = (run / "out.log").read_text(encoding="utf-8")
    results = [json.loads(line) for line in (run / "checkpoints" / "results.jsonl").read_text().splitlines()]
    figure, (losses, recalls) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    epochs = [int(e) + int(n) / int(total) for e, n, total in re.findall(r"Train Epoch: (\d+) \[ *(\d+)/(\d+)", log)]
    for term in ("Contrastive_loss", "Match_loss", "Consistency_loss"):
        values = [float(value) for value in re.findall(rf" {term}: ([0-9.eE+-]+) \(", log)]
        losses.plot(epochs, values, label=term.lower())
    losses.set(xlabel="epoch", ylabel="weighted loss", title="training")
    for ranking in ("global", "match", "fused"):
        values = [line[f"retrieval_{ranking}_mR"] for line in results]
        recalls.plot([line["epoch"] for line in results], values, marker="o", label=ranking)
    recalls.set(xlabel="epoch", ylabel="mR (%)", title="validation: mean recall by ranking")
    for axes in (losses, recalls):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
