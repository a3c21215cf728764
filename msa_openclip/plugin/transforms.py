"""open_clip's `image_transform` with the key `dihedral` in `aug_cfg`, for every model."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from .patching import replace


def extend_transform(transform: ModuleType) -> None:
    """Let every model's `aug_cfg` have the key `dihedral`, which open_clip would refuse as unknown."""
    original = getattr(transform, "image_transform", None)
    if original is None:
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def image_transform(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        aug_cfg = call.arguments.get("aug_cfg")
        if not isinstance(aug_cfg, Mapping) or "dihedral" not in aug_cfg:
            return original(*args, **kwargs)
        from torchvision.transforms import Compose  # type: ignore[import-untyped]

        from .augmentation import RandomDihedral, split_aug_cfg

        wanted, call.arguments["aug_cfg"] = split_aug_cfg(aug_cfg)
        made = original(*call.args, **call.kwargs)
        if wanted and getattr(made, "is_naflex_transform_factory", False):
            raise ValueError(
                "aug_cfg.dihedral: NaFlex transforms (naflex=True) take no step before theirs; leave it out."
            )
        return Compose([RandomDihedral(), made]) if wanted and call.arguments["is_train"] else made

    replace(transform, "image_transform", image_transform)
