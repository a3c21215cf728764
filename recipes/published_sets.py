"""The published caption sets: names of their files, their splits, what is wrong with them, where to get them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class DataError(ValueError):
    """The files are not there, or not as published; the message says what was looked for."""


@dataclass(frozen=True, kw_only=True)
class PublishedSet:
    """One data set as its authors give it out."""

    captions: tuple[str, ...]
    """Names of the caption file that circulate, in the order in which they are looked for."""
    images: tuple[str, ...]
    """Names of the folder of images, likewise."""
    counts: Mapping[str, int]
    """Images of each published split."""
    build: tuple[str, ...] = ()
    """What `msa-openclip shards build` has to be told."""
    source: str
    """Where to get it."""
    flaws: tuple[str, ...] = ()
    """What to know of it; docs/data/ says more."""


SETS: dict[str, PublishedSet] = {
    "rsitmd": PublishedSet(
        captions=("dataset_RSITMD.json", "dataset_rsitmd.json"),
        images=("images",),
        counts={"train": 4291, "test": 452},
        build=("--holdout", "val=0.1"),  # published without val; the test images must not choose the epoch
        source="https://github.com/xiaoyuan1996/AMFMN/tree/master/RSITMD",
        flaws=(
            "Copies from before 28 October 2021 lack all captions of four training images; these are left out.",
            "There is no published val split, and several are in use: ours is a tenth of train, drawn by name.",
            "It shares images with RSICD: never train on one and test on the other.",
        ),
    ),
    "rsicd": PublishedSet(
        captions=("dataset_rsicd.json",),
        images=("RSICD_images", "images"),
        counts={"train": 8734, "val": 1094, "test": 1093},
        source="https://github.com/201528014227051/RSICD_optimal",
        flaws=(
            "69 % of the training captions are doubles: most images had fewer than five, which were repeated.",
            "It shares images with RSITMD: never train on one and test on the other.",
        ),
    ),
    "ucm": PublishedSet(
        captions=("dataset_ucm.json", "dataset.json"),
        images=("imgs", "images"),
        counts={"train": 1680, "val": 210, "test": 210},
        source="https://github.com/201528014227051/RSICD_optimal (UCM_captions)",
        flaws=(
            "The test captions are 377 different texts of 1,050; images 102 and 103 are the same picture.",
            "15 images outside the class agricultural have cropland captions.",
        ),
    ),
    "sydney": PublishedSet(
        captions=("dataset_sydney.json", "dataset.json"),
        images=("imgs", "images"),
        counts={"train": 497, "val": 58, "test": 58},
        source="https://github.com/201528014227051/RSICD_optimal (Sydney_captions)",
        flaws=("58 test images: one of them is 1.7 points of R@1.",),
    ),
    "nwpu": PublishedSet(
        captions=("dataset_nwpu.json",),
        images=("NWPU-RESISC45", "NWPU_images", "images"),
        counts={"train": 25200, "val": 3150, "test": 3150},
        source="https://github.com/HaiyanHuang98/NWPU-Captions; the images are those of NWPU-RESISC45",
    ),
}


def find(published: PublishedSet, folder: Path) -> tuple[Path, Path]:
    """The caption file and the folder of images below `folder`.

    Raises:
        DataError: one of them is not there under any of its names.
    """
    return _first(folder, published.captions, published), _first(folder, published.images, published)


def _first(folder: Path, names: tuple[str, ...], published: PublishedSet) -> Path:
    for name in names:
        if (folder / name).exists():
            return folder / name
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
    raise DataError(
        f"{folder}: no {' or '.join(names)} ({there}). Get the set from {published.source}, "
        "or name the files with --captions and --images."
    )


def differences(published: PublishedSet, splits: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the built shards have more or less than the published splits; images held out for val belong to train."""
    built = {name: int(row["images"]) for name, row in splits.items()}
    if "val" not in published.counts:
        built["train"] = built.get("train", 0) + built.pop("val", 0)
    return [
        f"{name}: {built.get(name, 0):,} images, published are {count:,}"
        for name, count in published.counts.items()
        if built.get(name, 0) != count
    ]
