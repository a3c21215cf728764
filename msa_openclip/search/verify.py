"""Compare every byte of an index with what was written; no model is needed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..data.small_files import read_json, read_text
from .checksums import CheckedFile
from .files import (
    REJECTED,
    SEGMENT_FILE,
    TILES,
    ImageIndexError,
    Manifest,
    Segment,
    checked_files,
    damaged,
    open_parquet,
    read_columns,
    read_manifest,
    segment_extent,
)
from .item import ITEM, item_text
from .places import EARTH
from .schema import extent
from .vectors import Vectors


@dataclass
class Verified:
    """What `verify_index` found."""

    segments: int = 0
    images: int = 0
    rejected: int = 0
    """Images that could not be read when the index was built."""
    problems: list[str] = field(default_factory=list)
    """A line each, with file and remedy."""


def verify_index(folder: str) -> Verified:
    """Read all of an index: its manifest, and every file of every segment.

    Args:
        folder: of the index; one that does not exist or has no manifest is a problem, too.
    """
    root, found = Path(folder), Verified()
    try:
        manifest = read_manifest(root)
    except ImageIndexError as error:
        found.problems.append(str(error))
        return found
    for segment in manifest.segments:
        found.segments += 1
        found.images += segment.images
        try:
            found.rejected += _verify_segment(root, segment)
        except ImageIndexError as error:
            found.problems.append(str(error))
    if not found.problems:
        found.problems += _other_item(root, manifest)
    found.problems += _damaged_neighbours(root)
    return found


def _other_item(root: Path, manifest: Manifest) -> list[str]:
    """item.json, if it is not what the segments say."""
    try:
        if read_text(root / ITEM) == item_text(root, manifest):
            return []
        reason = "not what was written"
    except (OSError, ValueError) as error:
        reason = str(error)
    return [f"{root / ITEM}: damaged ({reason}); delete it and run `msa-openclip index` once more."]


def _damaged_neighbours(root: Path) -> list[str]:
    """Files of FAISS that are not what was written, a line each."""
    problems = []
    for path in sorted(root.glob("*.faiss")):
        try:
            CheckedFile(path, read_json(path.with_suffix(".faiss.json"))).check_all()
        except (OSError, ValueError) as error:
            problems.append(f"{path}: damaged ({error}); delete it, it will be built again.")
    return problems


def _verify_segment(root: Path, segment: Segment) -> int:
    """How many images were left out of a segment.

    Raises:
        ImageIndexError: one of its files is not what was written, or holds what no build writes.
    """
    folder = root / segment.name
    try:
        files = checked_files(root, segment)
        for checked in files.values():
            checked.check_all()
    except (OSError, ValueError) as error:
        raise error if isinstance(error, ImageIndexError) else damaged(folder, str(error)) from error
    for name in files.keys() & {"features.npy", "projected.npy"}:
        Vectors(folder, files[name], segment.images).check_all()
    read = {
        name: read_columns(folder, parquet, parquet.schema_arrow.names, segment.images if name == TILES else None)
        for name in files.keys() & {TILES, REJECTED}
        for parquet in [open_parquet(folder, files[name])]
    }
    if segment_extent(root, segment) not in (EARTH, extent(read[TILES])):
        raise damaged(folder, f"{SEGMENT_FILE}: bbox is not that of the images")
    return len(read[REJECTED]) if REJECTED in read else 0
