"""Decodes images from their locations as shards would hold them, preprocesses and batches them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..shards.imagery import geotiff
from ..shards.imagery import prepare as shard_images
from ..shards.options import ImageOptions
from ..shards.records import Location
from .captioned import CaptionedImage, EvalDataError
from .steady_scenes import steady_scene
from .streams import read_location

Preprocess = Callable[[Image.Image], Tensor]
"""RGB image -> (3, h, w)."""


def load_image(image: CaptionedImage) -> Image.Image:
    """An image to look at, of several dates side by side; decoded as by `load_dates`.

    Raises:
        EvalDataError: it cannot be read or decoded.
    """
    return shard_images.side_by_side(load_dates(image))


def load_dates(image: CaptionedImage) -> list[Image.Image]:
    """Decode an image, of every date, as shards would hold it: RGB, upright, 8 bit; from TIFF, windows of scenes, too.

    Raises:
        EvalDataError: it cannot be read or decoded.
    """
    return [_load(image, place) for place in image.locations]


def _load(image: CaptionedImage, place: Location) -> Image.Image:
    try:
        if place.window:
            return geotiff.read_pixels(place, ImageOptions(geo=True), steady_scene)[0].convert("RGB")
        return shard_images.decode(read_location(place))
    except Exception as error:  # Pillow raises nearly everything for one broken file or another
        raise EvalDataError(f"{place.url}: image {image.image_id} cannot be read: {error}") from error


def dates_of(picture: Image.Image | Sequence[Image.Image]) -> list[Image.Image]:
    """The pictures of a place in order of date, as RGB; one as a rule."""
    pictures = [picture] if isinstance(picture, Image.Image) else picture
    return [one.convert("RGB") for one in pictures]


def preprocessed(pictures: Sequence[Image.Image], preprocess: Preprocess) -> Tensor:
    """RGB pictures of one place in order of date -> (3, h, w) of a single one, (dates, 3, h, w) of several.

    A random `preprocess` draws the same crop, flip, ... for all of them.

    Raises:
        ValueError: they are of different sizes, so that equal crops would be of different places.
    """
    if len(pictures) == 1:
        return preprocess(pictures[0])
    shard_images.require_one_size(picture.size for picture in pictures)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    pixels = []
    for picture in pictures:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])
        pixels.append(preprocess(picture))
    return torch.stack(pixels)


def image_pixels(image: CaptionedImage, preprocess: Preprocess) -> Tensor:
    """Preprocessed pixels (3, h, w) of one image, or (dates, 3, h, w) of several dates.

    Raises:
        EvalDataError: it cannot be read, decoded or brought to its size.
    """
    decoded = load_dates(image)
    try:
        return preprocessed(decoded, preprocess)
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
    """Preprocessed pixels (B, 3, h, w), or (B, dates, 3, h, w), of each batch of indices.

    Draws nothing from the global random generator.
    """
    loader = DataLoader(
        _Pixels(images, preprocess),
        batch_sampler=[list(batch) for batch in chosen],
        num_workers=workers,
        generator=torch.Generator(),
    )
    yield from loader
