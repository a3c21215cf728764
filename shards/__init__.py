"""Shard builder: captions and images -> WebDataset shards that open_clip reads.  Imports nothing of torch."""

from .build import BuildSummary, build
from .options import BuildOptions, ImageOptions, ReadOptions
from .records import ShardError
from .verify import Verification, verify

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
