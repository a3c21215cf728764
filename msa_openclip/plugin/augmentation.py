"""Augmentation for pictures taken from above, which have no up: `--aug-cfg dihedral=True` of open_clip_train.main."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image

KEY = "dihedral"
"""Of open_clip's `aug_cfg`, besides the keys that open_clip knows."""


class RandomDihedral:
    """One of the 8 flips and quarter turns of an image, each as likely; no pixel is interpolated or lost.

    Draws from torch's generator, which data loaders seed in each worker.  Words that name a side ("left", "north of")
    do not turn with the image: leave it out for captions that have many of them.
    """

    def __call__(self, image: Image.Image) -> Image.Image:
        drawn = int(torch.randint(8, ()))
        return image.transpose(Image.Transpose(drawn)) if drawn < 7 else image  # Pillow has all but the identity

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def split_aug_cfg(aug_cfg: Mapping[str, Any]) -> tuple[bool, dict[str, Any]]:
    """Whether `dihedral` is asked for, and the other keys of an `aug_cfg`.

    Raises:
        ValueError: its value is neither True nor False.
    """
    others = dict(aug_cfg)
    wanted = others.pop(KEY, False)
    if not isinstance(wanted, bool):
        raise ValueError(f"aug_cfg.{KEY}: got {wanted!r}, expected True or False (--aug-cfg {KEY}=True).")
    return wanted, others
