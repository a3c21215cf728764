"""How features are written; imports nothing heavy, for the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

DTYPES = ("float16", "float32")
"""What features can be stored in; the first is the default."""
AUG_CFG = {"dihedral": True}
"""Default augmentation of views, as open_clip's `aug_cfg`."""


@dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """What is written and how."""

    views: int = 0
    """Augmented views of each image; 0: one, not augmented, as validation sees it."""
    augment: Callable[..., Any] | None = None
    """The training transform of the views."""
    aug_cfg: Mapping[str, Any] | None = None
    """What `augment` was made of, for the header."""
    dtype: str = DTYPES[0]
    batch_size: int = 64
    workers: int = 0
    """Processes that decode and augment images."""
    progress: bool = False
    """Progress bars on stderr."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: {self.dtype!r} is unknown; choose {' or '.join(DTYPES)}.")
        if self.views < 0 or (self.views and self.augment is None):
            raise ValueError(f"views: got {self.views}; expected 0, or more with a transform to augment by.")
