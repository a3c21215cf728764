"""What an evaluation is made of: images with all that is said about them, and which caption belongs to which image.

Only places are kept, never pixels: a set of any size is a list of (file, offset, size), and each worker or rank reads
the bytes of its own share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .metrics import Truth
from .shards.records import Location


class EvalDataError(ValueError):
    """The data to evaluate on cannot be used; the message names file, sample and remedy."""


@dataclass(frozen=True)
class CaptionedImage:
    """One image of an evaluation set and all that is said about it."""

    image_id: str
    place: Location
    captions: tuple[str, ...]
    """May be empty: the image then only distracts."""
    label: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """What else shards know of it: `geo` (crs, bounds, gsd_m), `meta`."""


class EvalSet:
    """Images, their distinct captions, and which caption belongs to which image.

    Raises:
        EvalDataError: there is no image, or no caption.
    """

    def __init__(self, images: Sequence[CaptionedImage], source: str) -> None:
        self.images, self.source = tuple(images), source
        owner = [index for index, image in enumerate(self.images) for _ in image.captions]
        said = [caption for image in self.images for caption in image.captions]
        if not said:
            raise EvalDataError(f"{source}: {len(self.images)} images with no caption at all; nothing to evaluate.")
        columns: dict[str, int] = {}
        column = torch.tensor([columns.setdefault(caption, len(columns)) for caption in said])
        order = column.argsort(stable=True)
        self.texts = tuple(columns)
        """Distinct captions; entry c is score column c."""
        self.per_caption = Truth.per_caption(torch.tensor(owner)[order], column=column[order], images=len(self.images))
        self.merged = Truth.merged(torch.tensor(owner)[order], column=column[order], images=len(self.images))

    @property
    def captions(self) -> int:
        """Captions, copies included."""
        return len(self.per_caption.query_column)

    @property
    def classes(self) -> tuple[tuple[str, ...], Tensor]:
        """Names of the classes and the class of every image (I,), -1 where it has none."""
        names = tuple(sorted({image.label for image in self.images if image.label is not None}))
        number = {name: index for index, name in enumerate(names)}
        return names, torch.tensor([-1 if i.label is None else number[i.label] for i in self.images])
