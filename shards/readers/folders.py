"""Reader of scene classification sets: a folder per class, captions made from templates."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from ..imagery.prepare import EXTENSIONS
from ..options import ReadOptions
from ..records import SPLITS, Entry, Rejection, ShardError, class_words
from ..storage import store


def read_folder(folder: str, options: ReadOptions) -> Iterator[Entry | Rejection]:
    """CLASS/image.jpg, or SPLIT/CLASS/image.jpg; every template gives one caption."""
    names = [name for name in store.listing(folder) if name.lower().endswith(EXTENSIONS)]
    if not any("/" in name for name in names):
        raise ShardError(f"{folder}: no folder with images in it; expected CLASS/image.jpg or SPLIT/CLASS/image.jpg.")
    splits = {*SPLITS, *options.renames}
    for name in names:
        *above, _ = PurePosixPath(name).parts
        split = above.pop(0) if above and above[0] in splits else None
        if not above:
            yield Rejection(name, "no class", "the image lies outside every class folder")
            continue
        label = class_words(above[-1])
        yield Entry(name, tuple(template.replace("{}", label) for template in options.templates), split, label)
