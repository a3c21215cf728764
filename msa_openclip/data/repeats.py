"""Which images are the same image: told by their names, their contents, and their windows of one scene."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from ..shards.records import Location
from .captioned import CaptionedImage
from .scenes import Skipped


def identity(image_id: str, content: str, location: Location) -> Hashable:
    """What tells an image from every other: names repeat between sets, and the windows of a scene share its content.

    Args:
        image_id: its name.
        content: what tells it from other images of its name; empty where that is not known, its place then counts.
        location: where it lies.
    """
    return image_id, content or location, location.window


def without_repeats(images: Iterable[CaptionedImage]) -> tuple[list[CaptionedImage], list[Skipped]]:
    """The images, each once, and what was left out."""
    kept: list[CaptionedImage] = []
    repeated: list[Skipped] = []
    seen = set()
    for image in images:
        found = identity(image.image_id, image.content, image.location)
        if found in seen:
            repeated.append(Skipped(image.image_id, "it occurs twice in the list"))
            continue
        seen.add(found)
        kept.append(image)
    return kept, repeated
