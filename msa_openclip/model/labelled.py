"""Texts of a batch with the scene classes of their images, for losses that compare them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import cached
from .cached import CachedTexts


@dataclass(frozen=True)
class LabelledTexts:
    """A batch of texts as the model takes them, and a number for each; moves like a tensor."""

    texts: Tensor | CachedTexts
    classes: Tensor
    """(B,) `class_number` of each pair."""

    def __len__(self) -> int:
        return len(self.texts)

    def to(self, *args: Any, **kwargs: Any) -> LabelledTexts:
        """As `Tensor.to`; a dtype is for features alone."""
        place = {key: value for key, value in kwargs.items() if key != "dtype"}
        places = [value for value in args if not isinstance(value, torch.dtype)]
        classes = self.classes.to(*places, **place) if places or place else self.classes
        return LabelledTexts(self.texts.to(*args, **kwargs), classes)


def to_dicts(image: Any, text: Any) -> tuple[Any, Any]:
    """What our loader batches, for a trainer that moves tensors and dicts alone; tensors as they are."""
    if not isinstance(text, LabelledTexts):
        return cached.to_dicts(image, text)
    image, texts = cached.to_dicts(image, text.texts)
    return image, {"texts": texts, "classes": text.classes}


def from_dicts(image: Any, text: Any) -> tuple[Any, Any]:
    """The inverse of `to_dicts`."""
    if not (isinstance(text, Mapping) and "classes" in text):
        return cached.from_dicts(image, text)
    image, texts = cached.from_dicts(image, text["texts"])
    return image, LabelledTexts(texts, text["classes"])


def class_number(name: str) -> int:
    """A number for a scene class, the same on every rank: classes are only compared, so that none needs a list."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big", signed=True)
