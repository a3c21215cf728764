"""From the published files of a caption set to test recalls, in one command:

    python recipes/run.py rsitmd --data RSITMD --start clip --out out/rsitmd
    python recipes/run.py ucm --data UCM_captions --start remoteclip --weights RemoteCLIP-ViT-B-32.pt --out out/ucm
    python recipes/run.py rsicd --data RSICD --start imagenet --seeds 0 1 2 --out out/rsicd -- --accum-freq 2
    python recipes/run.py rsicd --data RSICD --start frozen --out out/rsicd     # heads alone, minutes on a laptop
    python recipes/run.py rsicd --data RSICD --start imagenet-lite --out out/rsicd      # the same, then the towers

Builds shards, trains with each seed, chooses the epoch of each run on val, tests it once.  Every command is printed as
you would type it, and what is done already is not done again: after an interruption give the same command.  What
follows `--` goes to open_clip_train.main and wins over the recipe's own choice.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from published_sets import SETS, DataError, differences, find
from starts import STARTS, Start

from msa_openclip.reports.run_plot import plot_run
from msa_openclip.shards import ShardError, manifest
from msa_openclip.steps import CLI, TRAIN, StepError, run, shard_pattern
from msa_openclip.training.checkpoints import is_whole

MOST_CHECKPOINTS = 10
"""Epochs that are validated and saved, evenly spread: a checkpoint of a ViT-B run takes 2 GB."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    shards: Path = options.out / "shards"
    run(CLI, *shards_command(options, shards))
    splits = manifest.read(str(shards))["splits"]
    for line in (*SETS[options.set].flaws, *differences(SETS[options.set], splits)):
        print(f"note: {line}")
    stages = stages_of(options, splits)
    for stage in stages:
        if STARTS[stage.start].views:
            run(CLI, *features_command(stage, shards))
    for seed in options.seeds:
        for stage in stages:
            if is_whole(last_checkpoint(stage, seed)):
                print(f"\n{run_folder(stage, seed)} is trained.")
            else:
                run(TRAIN, *train_command(stage, shards, splits, seed))
    run(CLI, *test_command(options, shards))
    for seed in options.seeds:
        plot_run(run_folder(options, seed), run_folder(options, seed).with_suffix(".png"))
    report = report_path(options)
    print(f"\nRecalls: {report}.json\nPage with examples: {report}.html\nCurves: {options.out / 'logs'}/*.png")
    print(f"Model card: msa-openclip card {run_folder(options, options.seeds[0])} --eval {report}.json > README.md")


def shards_command(options: argparse.Namespace, shards: Path) -> list[object]:
    """`msa-openclip shards build ...`; the same command again finds the shards finished."""
    published = SETS[options.set]
    captions, images = options.captions, options.images
    if captions is None or images is None:
        found = find(published, options.data)
        captions, images = captions or found[0], images or found[1]
    return ["shards", "build", captions, shards, "--images", images, "--name", options.set, *published.build]


def stages_of(options: argparse.Namespace, splits: Mapping[str, Mapping[str, Any]]) -> list[argparse.Namespace]:
    """The trainings one after the other, each with its options; the last one is what was asked for."""
    if not STARTS[options.start].heads_first:
        return [options]
    frozen = STARTS["frozen"]
    batch_size = min(frozen.batch_size, int(splits["train"]["samples"]))
    changed = {"start": "frozen", "lr": frozen.lr, "epochs": frozen.epochs, "batch_size": batch_size}
    heads = argparse.Namespace(**{**vars(options), **changed, "train": features_words(options)})
    return [heads, argparse.Namespace(**{**vars(options), "heads": heads})]


def features_words(options: argparse.Namespace) -> list[str]:
    """Of what follows `--`, what makes other features."""
    return [word for word in options.train if word == "--force-quick-gelu"]


def features_command(options: argparse.Namespace, shards: Path) -> list[object]:
    """`msa-openclip features ...`: outputs of the locked towers; the same command again finds them finished."""
    start = STARTS[options.start]
    model = f"{options.model}={options.weights}" if options.weights else options.model
    return [
        "features", model, features_folder(options), "--shards", shard_pattern(shards, "train"),
        "--views", start.views, *start.augmentation, *model_options(options), *features_words(options),
        "--device", options.device, "--precision", options.precision, "--workers", options.workers,
    ]  # fmt: skip


def features_folder(options: argparse.Namespace) -> Path:
    """Where the features of the training images lie."""
    return Path(options.out / "features" / f"{options.start}-{options.model}")


def train_command(
    options: argparse.Namespace, shards: Path, splits: Mapping[str, Mapping[str, Any]], seed: int
) -> list[object]:
    """`python -m open_clip_train.main ...`; goes on behind the last checkpoint where there is one."""
    start, folder = STARTS[options.start], run_folder(options, seed)
    steps = options.epochs * max(1, int(splits["train"]["samples"]) // options.batch_size)
    every = math.ceil(options.epochs / MOST_CHECKPOINTS)
    return [
        "--model", options.model, *pretrained(options, seed), *start.locks,
        "--train-data", train_pattern(options, shards), "--val-data", shard_pattern(shards, "val"),
        "--dataset-type", "webdataset", *start.augmentation,
        "--epochs", options.epochs, "--batch-size", options.batch_size, "--lr", options.lr, "--wd", start.wd,
        "--warmup", steps // 10, "--seed", seed, "--workers", options.workers,
        "--device", options.device, "--precision", options.precision,
        "--val-frequency", every, "--save-frequency", every, "--log-every-n-steps", 20,
        "--logs", folder.parent, "--name", folder.name, "--resume", "latest", *options.train,
    ]  # fmt: skip


def pretrained(options: argparse.Namespace, seed: int) -> list[object]:
    """The weights that a training starts from, with what belongs to them."""
    if options.heads:
        own = [word for word in model_options(options) if word != "--pretrained-image"]
        return ["--pretrained", last_checkpoint(options.heads, seed), *own]
    return [*(["--pretrained", options.weights] if options.weights else []), *model_options(options)]


def train_pattern(options: argparse.Namespace, shards: Path) -> str:
    """The shards of images to train on, or those of their features, which have the same names."""
    images = shard_pattern(shards, "train")
    return f"{features_folder(options)}/{Path(images).name}" if STARTS[options.start].views else images


def model_options(options: argparse.Namespace) -> list[str]:
    """What belongs to the weights: the start's options, the activation that a tag's weights were made with.

    A file does not tell its own.  Other weights for a start on ImageNet's come with CLIP's mean and deviation.
    """
    from open_clip.pretrained import get_pretrained_cfg

    start = STARTS[options.start]
    own = [] if options.weights and "--pretrained-image" in start.options else list(start.options)
    tag = get_pretrained_cfg(options.model, options.weights) if options.weights else {}
    return [*own, *(["--force-quick-gelu"] if tag.get("quick_gelu", False) else [])]


def test_command(options: argparse.Namespace, shards: Path) -> list[object]:
    """`msa-openclip best ...`: each run's best epoch on val, tested once."""
    report = report_path(options)
    runs = [run_folder(options, seed) for seed in options.seeds]
    reports = ("--bootstrap", 1000, "--json", f"{report}.json", "--html", f"{report}.html")
    running = ("--device", options.device, "--workers", options.workers)
    return ["best", *runs, "--shards", shard_pattern(shards, "test"), *running, *reports]


def run_folder(options: argparse.Namespace, seed: int) -> Path:
    """Where open_clip_train.main keeps a run."""
    return Path(options.out / "logs" / f"{options.start}-{options.model}-seed{seed}")


def last_checkpoint(options: argparse.Namespace, seed: int) -> Path:
    """Of a run."""
    return run_folder(options, seed) / "checkpoints" / f"epoch_{options.epochs}.pt"


def report_path(options: argparse.Namespace) -> Path:
    """Of the reports, without their suffixes."""
    return Path(options.out / f"{options.start}-{options.model}")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; those not given as the start has them, and as the machine can."""
    own, train = _split(arguments)
    starts = "\n".join(f"  {name:13}  {start.what}" for name, start in STARTS.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"starts:\n{starts}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("set", choices=SETS, help="the caption set")
    parser.add_argument("--data", type=Path, default=Path("."), help="folder of its files as published (.)")
    parser.add_argument("--captions", type=Path, help="its caption file, where it has another name")
    parser.add_argument("--images", type=Path, help="its folder of images, likewise")
    parser.add_argument("--start", choices=STARTS, default="clip", help="what to start from, see below (%(default)s)")
    parser.add_argument("--weights", help="pretrained tag of open_clip or file; remoteclip and georsclip need the file")
    parser.add_argument("--model", help="another MSA model of the same towers as the weights, e.g. MSA-ViT-L-14")
    parser.add_argument("--out", type=Path, required=True, help="folder for shards, runs and reports")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run each (0)")
    for name, kind in (("epochs", int), ("batch-size", int), ("lr", float)):
        parser.add_argument(f"--{name}", type=kind, help="default: the start's")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--precision", help="default: amp_bf16 on cuda, fp32 on the CPU")
    parser.add_argument("--workers", type=int, help="loader processes (4 on cuda, 1 on the CPU)")
    options = parser.parse_args(own)
    start = STARTS[options.start]
    if start.file and not options.weights:
        parser.error(f"--start {options.start} needs --weights FILE: {start.file}")
    options.train, options.heads = train, None
    return _with_defaults(options, start)


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    given = list(arguments)
    place = given.index("--") if "--" in given else len(given)
    return given[:place], given[place + 1 :]


def _with_defaults(options: argparse.Namespace, start: Start) -> argparse.Namespace:
    import torch

    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_cpu = options.device == "cpu"
    defaults = {
        "weights": start.weights,
        "model": start.model,
        "epochs": start.epochs,
        "batch_size": start.batch_size,
        "lr": start.lr,
        "precision": "fp32" if on_cpu else "amp_bf16",  # amp is bf16 on CPUs, and slow on those without units for it
        "workers": 1 if on_cpu else 4,
    }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


if __name__ == "__main__":
    try:
        main()
    except (StepError, DataError, ShardError) as error:
        sys.exit(str(error))
