"""Shard builder: captions and images -> WebDataset shards that open_clip reads.  Imports nothing of torch."""

from .build import BuildSummary, build
from .options import BuildOptions, ImageOptions, ReadOptions
from .records import ShardError

__all__ = ["BuildOptions", "BuildSummary", "ImageOptions", "ReadOptions", "ShardError", "build"]
