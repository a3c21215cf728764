"""From the arguments that subcommands share to what they name: images with captions, models, options of a run."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import replace
from typing import Any

import torch

from ..data.captioned import CaptionedImage, EvalDataError
from ..data.readers import read_captions, read_shards
from ..evaluation.eval_set import EvalSet
from ..evaluation.loading import LoadedModel, ModelError, load
from ..evaluation.options import EvalOptions
from ..evaluation.seen_captions import read_train_captions
from .options import DEVICES


def read_images(parsed: argparse.Namespace) -> tuple[list[CaptionedImage], str]:
    """The images of --shards or --captions, and what to call them.

    Raises:
        EvalDataError: the data cannot be read, or the pattern of the classes fits nothing.
    """
    if parsed.shards is not None:
        images, source = read_shards(parsed.shards), str(parsed.shards)
    else:
        split = None if parsed.split == "all" else parsed.split
        folder = parsed.images or os.path.dirname(parsed.captions)
        images = read_captions(parsed.captions, folder, split=split, kind=parsed.kind)
        source = f"{parsed.captions}, split {parsed.split}"
    return label(images, parsed.class_regex), source


def label(images: list[CaptionedImage], pattern: re.Pattern[str] | None) -> list[CaptionedImage]:
    """Take the class of each image from its id, as the first group of the pattern.

    Raises:
        EvalDataError: the pattern fits no image.
    """
    if pattern is None:
        return images
    matches = [pattern.search(image.image_id) for image in images]
    labels = [match.group(1) if match else None for match in matches]
    if not any(labels):
        raise EvalDataError(f"--class-regex {pattern.pattern!r} fits no image id; the first is {images[0].image_id!r}.")
    return [replace(image, label=name) for image, name in zip(images, labels, strict=True)]


def read_set(parsed: argparse.Namespace) -> EvalSet:
    """`read_images`, ready to evaluate; against --train-captions where the subcommand has it."""
    train = getattr(parsed, "train_captions", None)
    return EvalSet(*read_images(parsed), read_train_captions(train) if train else None)


def running(parsed: argparse.Namespace) -> EvalOptions:
    """The options of `options.add_running`."""
    return EvalOptions(
        batch_size=parsed.batch_size, workers=parsed.workers, memory_mb=parsed.memory_mb, progress=parsed.progress
    )


def load_model(spec: str, parsed: argparse.Namespace, **how: Any) -> LoadedModel:
    """The model on --device, in --precision where the subcommand has it, its code run if --trust-remote-code says so.

    `how` are further arguments of `load`.

    Raises:
        ModelError: this machine has no such device, or the model cannot be loaded.
    """
    require_device(parsed.device)
    precision = getattr(parsed, "precision", "fp32")
    return load(spec, parsed.device, precision, trust_remote_code=parsed.trust_remote_code, **how)


def require_device(device: str) -> None:
    """Refuse what --device names and this machine lacks.

    Raises:
        ModelError: it does.
    """
    devices = _devices()
    name = device if ":" in device or device == "cpu" else f"{device}:0"
    if name not in devices:
        raise ModelError(f"--device {device}: this machine has {', '.join(devices)} only.")


def _devices() -> list[str]:
    """What --device can be on this machine."""
    counts = {kind: getattr(torch, kind).device_count() for kind in DEVICES if kind != "cpu"}
    return ["cpu", *(f"{kind}:{number}" for kind, count in counts.items() for number in range(count))]
