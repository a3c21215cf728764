"""Shard builder: captions and images -> WebDataset shards that open_clip reads.  Imports nothing of torch.

from msa_openclip.shards import BuildOptions, build
build("dataset_ucm.json", "shards/ucm", images="UCM/images", options=BuildOptions(name="ucm"), workers=4)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .options import BuildOptions, ImageOptions, ReadOptions
from .records import ShardError

if TYPE_CHECKING:
    from .building.build import BuildSummary, build
    from .checks.verify import Verification, verify

_ON_FIRST_USE = {
    "BuildSummary": "building.build",
    "Verification": "checks.verify",
    "build": "building.build",
    "verify": "checks.verify",
}
"""Name -> module below this package that needs NumPy, Pillow and fsspec: 0.1 s that help can do without."""

__all__ = [
    "BuildOptions",
    "BuildSummary",
    "ImageOptions",
    "ReadOptions",
    "ShardError",
    "Verification",
    "build",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_ON_FIRST_USE[name]}", __name__), name)
