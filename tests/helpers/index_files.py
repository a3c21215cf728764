"""Metadata of an index on disk, without a model and without vectors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from msa_openclip.data.captioned import CaptionedImage
from msa_openclip.search.checksums import CheckedFile, checksums
from msa_openclip.search.schema import Product, extent, parquet, to_table
from msa_openclip.search.tiles import Tiles


def append_part(tiles: Tiles, path: Path, images: Sequence[CaptionedImage], count: int | None = None) -> None:
    """Write images as one more segment, which claims to have `count` of them."""
    product = Product(model="MSA-x=y.pt", fingerprint="ab" * 32, embed_dim=5)
    table = to_table(images)
    path.write_bytes(parquet(table, product))
    checked = CheckedFile(path, checksums(path))
    tiles.append(path.parent, checked, len(images) if count is None else count, extent(table))


def tiles_of(folder: Path, parts: Sequence[Sequence[CaptionedImage]]) -> Tiles:
    """A segment for each part."""
    tiles = Tiles()
    for number, images in enumerate(parts):
        append_part(tiles, folder / f"{number}.parquet", images)
    return tiles
