"""Arguments that several subcommands share, and the types of arguments; imports nothing heavy."""

from __future__ import annotations

import argparse
import re

from ..evaluation.options import MOST_BATCH, MOST_MEMORY_MB, PRECISIONS, EvalOptions
from ..reports.run_selection import METRIC
from ..search.options import KINDS
from ..shards.arguments import MOST_WORKERS, add_choice, add_number, add_progress, whole_number
from ..shards.options import KINDS as CAPTION_KINDS
from ..shards.records import SPLITS

MOST_SAMPLES = 1_000_000
"""Of a bootstrap; intervals change no more long before that."""
DEVICES = ("cpu", "cuda", "mps", "xpu")
MODEL = "NAME=CHECKPOINT, NAME=TAG, hf-hub:ORG/REPO or local-dir:FOLDER"


def add_models(parser: argparse.ArgumentParser) -> None:
    """One model or more, as `loading.load` takes them."""
    parser.add_argument("models", nargs="+", metavar="MODEL", help=MODEL)


def add_data(parser: argparse.ArgumentParser, *, folder: str | None = None) -> None:
    """--shards, or --captions with --images; and the classes.

    Args:
        parser: of the subcommand.
        folder: help of a third source, --folder, where the subcommand has it.
    """
    group = parser.add_argument_group("data, from one source")
    sources = group.add_mutually_exclusive_group(required=True)
    if folder:
        sources.add_argument("--folder", type=place, metavar="FOLDER", help=folder)
    text = "WebDataset shards of either layout, e.g. 'data/test-{000..003}.tar'"
    sources.add_argument("--shards", type=place, metavar="PATTERN", help=text)
    text = "caption file or folder as `msa-openclip shards build` reads it"
    sources.add_argument("--captions", type=place, metavar="FILE", help=text)
    text = "of the images of --captions (default: the folder of the captions)"
    group.add_argument("--images", metavar="FOLDER", help=text)
    text = "split of --captions (default: %(default)s)"
    group.add_argument("--split", choices=(*SPLITS, "all"), default="test", help=text)
    add_choice(group, "--kind", "format of --captions", CAPTION_KINDS)
    text = "the class is the first group of this pattern in the image id, e.g. '^([a-z]+)_'"
    group.add_argument("--class-regex", type=class_pattern, metavar="PATTERN", help=text)


def add_running(parser: argparse.ArgumentParser) -> None:
    """--device, --precision, what bounds time and memory, and progress bars."""
    group = parser.add_argument_group("running")
    add_loading(group)
    add_batches(group)
    text = "bound on image sides and scores"
    add_number(group, "--memory-mb", text, default=EvalOptions().memory_mb, most=MOST_MEMORY_MB)
    add_progress(group)


def add_loading(group: argparse._ActionsContainer) -> None:
    """--device, --precision and --trust-remote-code, as `loading.load` takes them."""
    add_device(group)
    add_choice(group, "--precision", "of the towers, as for open_clip_train.main", PRECISIONS)


def add_device(group: argparse._ActionsContainer) -> None:
    """--device and --trust-remote-code."""
    text = f"{', '.join(DEVICES)}, cuda:1, ... (default: %(default)s)"
    group.add_argument("--device", type=device, default="cpu", help=text)
    text = "let the Python code run that a model's tokenizer or text tower brings along; only if you trust its makers"
    group.add_argument("--trust-remote-code", action="store_true", help=text)


def add_batches(group: argparse._ActionsContainer) -> None:
    """--batch-size and --workers."""
    defaults = EvalOptions()
    text = "images or captions encoded at once"
    add_number(group, "--batch-size", text, default=defaults.batch_size, most=MOST_BATCH)
    text = "processes that decode images, 0 for none beside this one"
    add_number(group, "--workers", text, default=defaults.workers, least=0, most=MOST_WORKERS)


def add_nearest(parser: argparse.ArgumentParser) -> None:
    """--nearest, as `search.nearest` takes it."""
    add_choice(parser, "--nearest", "search by global features", KINDS)


def add_moved_model(parser: argparse.ArgumentParser) -> None:
    """--model, for an index whose weights are no longer where they were."""
    parser.add_argument("--model", metavar="MODEL", help="NAME=CHECKPOINT, if the weights of the index have moved")


def add_metric(parser: argparse.ArgumentParser) -> None:
    """--metric, as `run_selection.best_epoch` takes it."""
    text = "key of results.jsonl by which the epoch is chosen (default: %(default)s)"
    parser.add_argument("--metric", default=METRIC, metavar="KEY", help=text)


def add_reports(parser: argparse.ArgumentParser, *, bootstrap: int) -> argparse._ArgumentGroup:
    """--bootstrap with its default, --json and --html; returns their group, for what a command adds."""
    group = parser.add_argument_group("report")
    text = "samples for 95 %% intervals over images, 0 for none"
    text = f"{text} (default: %(default)s)"
    group.add_argument("--bootstrap", type=bootstrap_samples, default=bootstrap, metavar="N", help=text)
    group.add_argument("--json", metavar="FILE", help="write everything as data")
    group.add_argument("--html", metavar="FILE", help="write a page with plots and images (needs matplotlib)")
    return group


def device(text: str) -> str:
    """Type of --device: a kind of device, with a number if need be."""
    kind, separator, number = text.partition(":")
    if kind not in DEVICES or bool(separator) != number.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no device; write one of {', '.join(DEVICES)}, or cuda:N")
    return text


def place(text: str) -> str:
    """Type of arguments that name where data lies: any text but none, as an unset variable of a shell gives it."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} names nothing; give a file, folder or pattern")
    return text


def bootstrap_samples(text: str) -> int:
    """Type of --bootstrap: 0 for none, else 2 or more, since one sample has no interval."""
    samples = whole_number(0, MOST_SAMPLES)(text)
    if samples == 1:
        raise argparse.ArgumentTypeError(f"{text!r} sample has no interval; write 0 for none, or 2 or more")
    return samples


def share(text: str) -> float:
    """Type of arguments such as --max-nodata: a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def class_pattern(text: str) -> re.Pattern[str]:
    """Type of --class-regex: a regular expression with a group."""
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error
    if not pattern.groups:
        raise argparse.ArgumentTypeError(f"{text!r} has no group for the class; write e.g. '^([a-z]+)_'")
    return pattern


def templates(text: str) -> tuple[str, ...]:
    """Type of --templates: separated by '|', each with {} in the place of the class."""
    parts = tuple(text.split("|"))
    for part in parts:
        if "{}" not in part:
            raise argparse.ArgumentTypeError(f"template {part!r} has no {{}} to put the class name in")
    return parts
