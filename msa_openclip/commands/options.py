"""Options that the evaluating subcommands share: which data, where and how to run."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import replace

from ..data.captioned import CaptionedImage, EvalDataError
from ..data.readers import read_captions, read_shards
from ..evaluation.eval_set import EvalSet
from ..evaluation.evaluate import EvalOptions


def add_models(parser: argparse.ArgumentParser) -> None:
    """The models, as `loading.load` takes them."""
    forms = "NAME=CHECKPOINT, NAME=TAG, hf-hub:ORG/REPO or local-dir:FOLDER"
    parser.add_argument("models", nargs="+", metavar="MODEL", help=forms)


def add_data(parser: argparse.ArgumentParser) -> None:
    """--shards, or --captions with --images; and the classes."""
    group = parser.add_argument_group("data, shards or a caption file")
    group.add_argument("--shards", help="WebDataset shards of either layout, e.g. 'data/test-{000..003}.tar'")
    group.add_argument("--captions", help="caption file or folder as `msa-openclip shards build` reads it")
    group.add_argument("--images", help="folder of the images of --captions (default: the folder of the captions)")
    group.add_argument("--split", default="test", help="split of --captions, or 'all' (default: %(default)s)")
    group.add_argument("--kind", default="auto", help="format of --captions (default: %(default)s)")
    group.add_argument(
        "--class-regex", help="the class is the first group of this pattern in the image id, e.g. '^([a-z]+)_'"
    )


def add_running(parser: argparse.ArgumentParser) -> None:
    """--device, --precision and what bounds time and memory."""
    defaults = EvalOptions()
    group = parser.add_argument_group("running")
    add_loading(group)
    group.add_argument("--batch-size", type=int, default=defaults.batch_size, help="default: %(default)s")
    group.add_argument("--workers", type=int, default=defaults.workers, help="image decoders (default: %(default)s)")
    group.add_argument(
        "--memory-mb", type=int, default=defaults.memory_mb, help="bound on sides and scores (%(default)s)"
    )


def add_loading(group: argparse._ActionsContainer) -> None:
    """--device and --precision, as `loading.load` takes them."""
    add_device(group)
    group.add_argument("--precision", default="fp32", help="of the towers, as for open_clip_train (%(default)s)")


def add_device(group: argparse._ActionsContainer) -> None:
    """--device alone."""
    group.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: %(default)s)")


def read_images(parsed: argparse.Namespace) -> tuple[list[CaptionedImage], str]:
    """The images of --shards or --captions, and what to call them.

    Raises:
        EvalDataError: neither or both are given, the data cannot be read, or the pattern of the classes fits nothing.
    """
    if bool(parsed.shards) == bool(parsed.captions):
        raise EvalDataError("give either --shards or --captions.")
    if parsed.shards:
        images, source = read_shards(parsed.shards), str(parsed.shards)
    else:
        split = None if parsed.split == "all" else parsed.split
        folder = parsed.images or os.path.dirname(parsed.captions)
        images = read_captions(parsed.captions, folder, split=split, kind=parsed.kind)
        source = f"{parsed.captions}, split {parsed.split}"
    return label(images, parsed.class_regex), source


def label(images: list[CaptionedImage], pattern: str | None) -> list[CaptionedImage]:
    """Take the class of each image from its id.

    Raises:
        EvalDataError: the pattern is no regular expression with a group, or fits no image.
    """
    if pattern is None:
        return images
    try:
        found = [re.search(pattern, image.image_id) for image in images]
        labels = [match.group(1) if match else None for match in found]
    except (re.error, IndexError) as error:
        raise EvalDataError(f"--class-regex {pattern!r}: {error}; expected e.g. '^([a-z]+)_'.") from error
    if not any(labels):
        raise EvalDataError(f"--class-regex {pattern!r} fits no image id; the first is {images[0].image_id!r}.")
    return [replace(image, label=name) for image, name in zip(images, labels, strict=True)]


def read_set(parsed: argparse.Namespace) -> EvalSet:
    """`read_images`, ready to evaluate."""
    return EvalSet(*read_images(parsed))


def running(parsed: argparse.Namespace) -> EvalOptions:
    """The options of `add_running`."""
    return EvalOptions(batch_size=parsed.batch_size, workers=parsed.workers, memory_mb=parsed.memory_mb)
