"""Decodes images from their locations as shards would hold them, preprocesses and batches them."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..shards.imagery import geotiff
from ..shards.imagery import prepare as shard_images
from ..shards.options import ImageOptions
from .captioned import CaptionedImage, EvalDataError
from .steady_scenes import steady_scene
from .streams import read_location

Preprocess = Callable[[Image.Image], Tensor]
"""RGB image -> (3, h, w)."""


def load_image(image: CaptionedImage) -> Image.Image:
    """Decode an image as shards would hold it: RGB, upright, 8 bit; from TIFF, and windows of scenes, too.

    Raises:
        EvalDataError: it cannot be read or decoded.
    """
    try:
        if image.location.window:
            return geotiff.read_pixels(image.location, ImageOptions(geo=True), steady_scene)[0].convert("RGB")
        ready = shard_images.prepare(read_location(image.location), ImageOptions())
        return Image.open(io.BytesIO(ready.data)).convert("RGB")
    except Exception as error:  # Pillow raises nearly everything for one broken file or another
        raise EvalDataError(f"{image.location.url}: image {image.image_id} cannot be read: {error}") from error


def image_pixels(image: CaptionedImage, preprocess: Preprocess) -> Tensor:
    """Preprocessed pixels (3, h, w) of one image.

    Raises:
        EvalDataError: it cannot be read, decoded or brought to its size.
    """
    decoded = load_image(image)
    try:
        return preprocess(decoded)
    except Exception as error:  # a picture of one row and a million columns, for example
        raise EvalDataError(f"{image.location.url}: image {image.image_id} cannot be preprocessed: {error}") from error


class _Pixels(Dataset[Tensor]):
    def __init__(self, images: Sequence[CaptionedImage], preprocess: Preprocess) -> None:
        self.images, self.preprocess = images, preprocess

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return image_pixels(self.images[index], self.preprocess)


def batch_spans(total: int, size: int) -> list[range]:
    """0 to `total` in batches of `size`; the last one may be smaller."""
    return [range(start, min(start + size, total)) for start in range(0, total, size)]


def batches(
    images: Sequence[CaptionedImage], preprocess: Preprocess, chosen: Iterable[Sequence[int]], workers: int = 0
) -> Iterator[Tensor]:
    """Preprocessed pixels (B, 3, h, w) of each batch of indices; draws nothing from the global random generator."""
    loader = DataLoader(
        _Pixels(images, preprocess),
        batch_sampler=[list(batch) for batch in chosen],
        num_workers=workers,
        generator=torch.Generator(),
    )
    yield from loader
