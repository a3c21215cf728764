"""Synthetic aerial scenes with five captions each, of things large, middle and small: data for demos and tests.

Every scene is drawn from (seed, split, index) alone.  Counts, colours, directions and places vary independently and
are named in the captions, so that a caption tells its image from the others of its class.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..records import SPLITS, ShardError
from ..storage import store
from .built import airport, intersection, parking, residential, sports_ground, storage_tanks
from .changes import MOST_DATES, change
from .country import beach, farmland, forest, harbor, river
from .words import Facts

COMPOSERS: dict[str, Callable[[np.random.Generator, int], tuple[Image.Image, Facts]]] = {
    "airport": airport,
    "farmland": farmland,
    "river": river,
    "residential": residential,
    "storage tanks": storage_tanks,
    "parking": parking,
    "harbor": harbor,
    "forest": forest,
    "beach": beach,
    "intersection": intersection,
    "sports ground": sports_ground,
}
CLASSES = tuple(COMPOSERS)


class Scene(NamedTuple):
    """One drawn scene."""

    image: Image.Image
    label: str
    captions: tuple[str, ...]


_NAME = "synthetic aerial scenes"


def scene(index: int, *, seed: int = 0, split: str = "train", size_px: int = 96) -> Scene:
    """Draw scene number `index` of a split; the classes take turns.

    Returns:
        A size_px x size_px RGB image, its scene class, and five captions.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    label = CLASSES[index % len(CLASSES)]
    image, facts = COMPOSERS[label](rng, size_px)
    return Scene(image, label, _captions(facts, rng))


def synthesize(
    folder: str, counts: Mapping[str, int], *, seed: int = 0, size_px: int = 96, dates: int = 1, progress: bool = False
) -> str:
    """Write scenes as a caption file in Karpathy format and JPEG images beside it, ready for `build`.

    Args:
        folder: a local folder, made if absent; gets captions.json and images/.
        counts: number of scenes for each of train, val, test.
        dates: images of each scene; with two and more these are the places of `changes`, with a named change.
    Returns:
        The path of captions.json.
    Raises:
        ShardError: an unknown split, nothing to draw, a size below 32 pixels, where nothing can be told apart, more
            than MOST_DATES dates, or files in `folder` that would be overwritten and are of no synthetic scenes.
    """
    unknown = set(counts) - set(SPLITS)
    if unknown or not sum(counts.values()) or min(counts.values()) < 0:
        raise ShardError(f"counts: {dict(counts)} must give numbers of scenes for {', '.join(SPLITS)}.")
    if size_px < 32:
        raise ShardError(f"size_px: {size_px} is below 32, where the small things vanish.")
    if not 1 <= dates <= MOST_DATES:
        raise ShardError(f"dates: {dates} is not within 1 to {MOST_DATES}.")
    path, images = Path(folder) / "captions.json", Path(folder) / "images"
    jobs = [(split, index) for split in SPLITS for index in range(counts.get(split, 0))]
    _require_ours(path, (images / name for split, index in jobs for name in _names(split, index, dates)))
    images.mkdir(parents=True, exist_ok=True)
    if not path.exists():  # so that what a kill leaves is known to be ours
        _write(path, [])
    rows = []
    for split, index in tqdm(jobs, desc="drawing", unit=" scenes", disable=not progress):
        pictures, row = _drawn(index, seed, split, size_px, dates)
        for name, image in pictures.items():
            image.save(images / name, quality=93)
        rows.append(row)
    _write(path, rows)
    return str(path)


def _require_ours(captions: Path, images: Iterable[Path]) -> None:
    """Raise ShardError for files of others that would be overwritten; beside our caption file images are ours."""
    if captions.exists():
        theirs = None if _NAME in captions.read_text(encoding="utf-8", errors="replace") else captions
    else:
        theirs = next((image for image in images if image.exists()), None)
    if theirs is not None:
        raise ShardError(f"{theirs}: is not of synthetic scenes and stays. Choose another folder.")


def _write(captions: Path, rows: list[dict[str, Any]]) -> None:
    store.write_text(str(captions), json.dumps({"dataset": _NAME, "images": rows}))


def _names(split: str, index: int, dates: int) -> list[str]:
    """The files of the pictures of a scene, in order of date."""
    stem = f"{split}_{index:06d}"
    return [f"{stem}.jpg"] if dates == 1 else [f"{stem}_{year}.jpg" for year in _years(dates)]


def _years(dates: int) -> list[str]:
    return [str(2000 + date) for date in range(dates)]


def _drawn(
    index: int, seed: int, split: str, size_px: int, dates: int
) -> tuple[dict[str, Image.Image], dict[str, Any]]:
    """The pictures of a scene by file name, and its row of the caption file."""
    names = _names(split, index, dates)
    if dates == 1:
        image, label, captions = scene(index, seed=seed, split=split, size_px=size_px)
        pictures, files = {names[0]: image}, {"filename": f"images/{names[0]}"}
        return pictures, {**files, "split": split, "class": label, "sentences": _sentences(captions)}
    taken, label, captions = change(index, dates=dates, seed=seed, split=split, size_px=size_px)
    pictures = dict(zip(names, taken, strict=True))
    listed = {"filenames": [f"images/{name}" for name in names], "dates": _years(dates)}
    return pictures, {**listed, "split": split, "class": label, "sentences": _sentences(captions)}


def _sentences(captions: Iterable[str]) -> list[dict[str, str]]:
    return [{"raw": caption} for caption in captions]


def _captions(facts: Facts, rng: np.random.Generator) -> tuple[str, ...]:
    place, large, middle, small, relation = facts
    choices = (
        (f"{place} with {large}", f"the image shows {place} with {large}", f"{large} in {place}"),
        (f"{place} has {middle}", f"{middle} can be seen in {place}", f"there is {place} with {middle}"),
        (f"{small} {relation}", f"we can see {small} {relation}", f"{small} {relation} in {place}"),
        (f"{small} and {middle} in {place}", f"{place} with {small} and {middle}"),
        (f"{place} with {large}, {middle} and {small}", f"{large}, {middle} and {small} in {place}"),
    )
    picked = (options[int(rng.integers(len(options)))] for options in choices)
    return tuple(text[0].upper() + text[1:] + "." for text in picked)
