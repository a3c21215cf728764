"""The images and captions of an evaluation, and which caption belongs to which image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..data.captioned import CaptionedImage, EvalDataError
from .metrics import GroundTruth
from .seen_captions import seen_parts


class EvalSet:
    """Images, their distinct captions, and which caption belongs to which image.

    Args:
        images: with their captions.
        source: what to call them.
        train_captions: captions of the training set; those of the images that stand in it, and those that do not, are
            then rated apart, too.
    Raises:
        EvalDataError: there is no image, or no caption.
    """

    def __init__(
        self, images: Sequence[CaptionedImage], source: str, train_captions: Iterable[str] | None = None
    ) -> None:
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
        self.parts = {} if train_captions is None else seen_parts(self.texts, train_captions)
        """By name the parts of the captions that are rated alone, too: (C,) True where a caption belongs to it."""
        self.per_caption = GroundTruth.per_caption(
            torch.tensor(owner)[order], column=column[order], images=len(self.images)
        )
        self.merged = GroundTruth.merged(torch.tensor(owner)[order], column=column[order], images=len(self.images))

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
