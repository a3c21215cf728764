"""Shard builder: captions and images -> WebDataset shards that open_clip reads.  Imports nothing of torch."""

from .building.build import BuildSummary, build
from .checks.verify import Verification, verify
from .options import BuildOptions, ImageOptions, ReadOptions
from .records import ShardError

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
