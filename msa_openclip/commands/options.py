"""Arguments that several subcommands share, and the types of arguments; imports nothing heavy."""

from __future__ import annotations

import argparse
import re

from ..evaluation.options import PRECISIONS, EvalOptions
from ..search.options import KINDS
from ..shards.arguments import add_progress, whole_number
from ..shards.options import KINDS as CAPTION_KINDS
from ..shards.records import SPLITS

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
        sources.add_argument("--folder", metavar="FOLDER", help=folder)
    sources.add_argument(
        "--shards", metavar="PATTERN", help="WebDataset shards of either layout, e.g. 'data/test-{000..003}.tar'"
    )
    sources.add_argument(
        "--captions", metavar="FILE", help="caption file or folder as `msa-openclip shards build` reads it"
    )
    group.add_argument(
        "--images", metavar="FOLDER", help="of the images of --captions (default: the folder of the captions)"
    )
    group.add_argument(
        "--split", choices=(*SPLITS, "all"), default="test", help="split of --captions (default: %(default)s)"
    )
    group.add_argument(
        "--kind", choices=CAPTION_KINDS, default="auto", help="format of --captions (default: %(default)s)"
    )
    group.add_argument(
        "--class-regex",
        type=class_pattern,
        metavar="PATTERN",
        help="the class is the first group of this pattern in the image id, e.g. '^([a-z]+)_'",
    )


def add_running(parser: argparse.ArgumentParser) -> None:
    """--device, --precision, what bounds time and memory, and progress bars."""
    defaults = EvalOptions()
    group = parser.add_argument_group("running")
    add_loading(group)
    add_batches(group)
    group.add_argument(
        "--memory-mb",
        type=whole_number(1),
        default=defaults.memory_mb,
        metavar="N",
        help="bound on image sides and scores (default: %(default)s)",
    )
    add_progress(group)


def add_loading(group: argparse._ActionsContainer) -> None:
    """--device and --precision, as `loading.load` takes them."""
    add_device(group)
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="of the towers, as for open_clip_train.main (default: %(default)s)",
    )


def add_device(group: argparse._ActionsContainer) -> None:
    """--device alone."""
    group.add_argument(
        "--device", type=device, default="cpu", help=f"{', '.join(DEVICES)}, cuda:1, ... (default: %(default)s)"
    )


def add_batches(group: argparse._ActionsContainer) -> None:
    """--batch-size and --workers."""
    defaults = EvalOptions()
    group.add_argument(
        "--batch-size",
        type=whole_number(1),
        default=defaults.batch_size,
        metavar="N",
        help="images or captions encoded at once (default: %(default)s)",
    )
    group.add_argument(
        "--workers",
        type=whole_number(0),
        default=defaults.workers,
        metavar="N",
        help="processes that decode images, 0 for none beside this one (default: %(default)s)",
    )


def add_nearest(parser: argparse.ArgumentParser) -> None:
    """--nearest, as `search.nearest` takes it."""
    parser.add_argument(
        "--nearest", choices=KINDS, default="auto", help="search by global features (default: %(default)s)"
    )


def add_moved_model(parser: argparse.ArgumentParser) -> None:
    """--model, for an index whose weights are no longer where they were."""
    parser.add_argument("--model", metavar="MODEL", help="NAME=CHECKPOINT, if the weights of the index have moved")


def add_reports(parser: argparse.ArgumentParser, *, bootstrap: int) -> argparse._ArgumentGroup:
    """--bootstrap with its default, --json and --html; returns their group, for what a command adds."""
    group = parser.add_argument_group("report")
    group.add_argument(
        "--bootstrap",
        type=whole_number(0),
        default=bootstrap,
        metavar="N",
        help="samples for 95 %% intervals over images, 0 for none (default: %(default)s)",
    )
    group.add_argument("--json", metavar="FILE", help="write everything as data")
    group.add_argument("--html", metavar="FILE", help="write a page with plots and images (needs matplotlib)")
    return group


def device(text: str) -> str:
    """Type of --device: a kind of device, with a number if need be."""
    kind, separator, number = text.partition(":")
    if kind not in DEVICES or bool(separator) != number.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no device; write one of {', '.join(DEVICES)}, or cuda:N")
    return text


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
