"""The main job end to end: captions -> shards -> open_clip_train.main -> best epoch by val -> test recalls and plots.

    python examples/quickstart.py --out out/demo                                       synthetic aerial scenes
    python examples/quickstart.py --out out/ucm --captions dataset_ucm.json --images images --epochs 30

Every command that it runs is printed as you would type it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from msa_openclip.reports.run_plot import plot_run
from msa_openclip.reports.run_selection import best_epoch
from msa_openclip.steps import CLI, TRAIN, StepError, run, shard_pattern

MODEL = "MSA-ViT-Ti"


def main() -> None:
    options = parse_arguments()
    out: Path = options.out
    if (out / "logs").exists():
        sys.exit(f"{out} holds an earlier run; remove it or name another folder with --out.")
    shards, trained = out / "shards", out / "logs" / "run"
    build_shards(options, shards)
    test = shard_pattern(shards, "test")
    evaluation = ("--shards", test, "--bootstrap", 0, "--workers", 1)
    run(CLI, "eval", f"{MODEL}=untrained", *evaluation, "--json", out / "before.json")
    run(
        TRAIN, "--model", MODEL, "--device", "cpu",
        "--precision", "fp32",  # amp, open_clip's default, is far slower on CPUs without bfloat16 units
        "--train-data", shard_pattern(shards, "train"), "--val-data", shard_pattern(shards, "val"),
        "--dataset-type", "webdataset",
        "--epochs", options.epochs, "--batch-size", 64, "--workers", 1, "--lr", options.lr, "--warmup", 30,
        "--aug-cfg", "scale=(0.9, 1.0)", "--save-frequency", 1, "--log-every-n-steps", 5,
        "--logs", out / "logs", "--name", trained.name,
    )  # fmt: skip
    best = best_epoch(str(trained))  # by the recalls on val; the test images are looked at once
    after = ("--json", out / "after.json", "--html", out / "retrieval.html")
    run(CLI, "eval", f"{MODEL}={best.checkpoint}", *evaluation, *after)
    plot_run(trained, out / "training.png")
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
        run(CLI, "shards", "build", options.captions, shards, *images)
    else:
        held_out = max(options.scenes // 8, 16)
        counts = ["--train", options.scenes, "--val", held_out, "--test", held_out]
        run(CLI, "shards", "synthesize", shards, *counts, "--shards", "image")


if __name__ == "__main__":
    try:
        main()
    except StepError as error:
        sys.exit(str(error))
