"""An index of the format before this one, records in JSON lines and `facts.npy`, as an index of today's format.

    convert_index("old.index", "new.index")

Vectors are taken as they are, so no model is needed; every file is compared with its checksums first.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..data.captioned import CaptionedImage
from ..data.small_files import parse_json, read_text
from ..shards.records import Location
from ..shards.storage import store
from ..shards.storage.locking import one_writer
from .build import publish, segment_name
from .checksums import CheckedFile, ChecksumError
from .files import (
    CONVERTIBLE,
    SEGMENT_FILE,
    ImageIndexError,
    Segment,
    is_written,
    or_damaged,
    read_manifest,
    read_segment,
    rejected_table,
    write_segment,
)
from .schema import to_table


def convert_index(old: str, new: str) -> int:
    """Write `new`, of today's format, from `old`, which stays as it is; returns how many images it holds.

    Interrupted, the same call goes on where it stopped.

    Raises:
        ImageIndexError: `old` is no whole index of the format before, or `new` is an index already.
        BeingWritten: another process is writing to `new`.
    """
    source, root = Path(old), Path(new)
    manifest = read_manifest(source, CONVERTIBLE)
    store.make_folder(new)
    with one_writer(new):
        if (root / "index.json").exists():
            raise ImageIndexError(f"{new}: there is an index already; choose another folder.")
        names = [_convert(source, segment, root, manifest) for segment in manifest.segments]
        publish(root, replace(manifest, segments=tuple(read_segment(root, name) for name in names)))
    return sum(segment.images for segment in manifest.segments)


def _convert(source: Path, segment: Segment, root: Path, manifest: Any) -> str:
    """Write a segment, unless it is there; returns its new name."""
    folder = source / segment.name
    files = or_damaged(folder, partial(_checked, folder, segment))
    images = [_image(row) for row in or_damaged(folder, partial(_lines, files["records.jsonl"]))]
    bad = or_damaged(folder, partial(_lines, files["rejected.jsonl"]))
    rejected = [_image(row) for row in bad]
    name = segment_name(manifest, [*images, *rejected])
    if not is_written(root, name):
        arrays = {kind: np.load(files[kind].path, mmap_mode="r") for kind in _ARRAYS & files.keys()}
        if any(len(array) != len(images) for array in arrays.values()):
            raise ImageIndexError(f"{folder}: damaged (vectors for another number of images than {len(images)}).")
        why = rejected_table(rejected, [row["why"] for row in bad])
        write_segment(
            root, name, manifest, to_table(images), arrays.get("features.npy"), arrays.get("projected.npy"), why
        )
    return name


_ARRAYS = {"features.npy", "projected.npy"}


def _checked(folder: Path, segment: Segment) -> dict[str, CheckedFile]:
    text = read_text(folder / SEGMENT_FILE)
    if hashlib.sha256(text.encode()).hexdigest() != segment.checksum:
        raise ChecksumError(f"{SEGMENT_FILE} is not what was written")
    files = {name: CheckedFile(folder / name, sums) for name, sums in parse_json(text, SEGMENT_FILE)["files"].items()}
    for checked in files.values():
        checked.check_all()
    return files


def _lines(checked: CheckedFile) -> list[dict[str, Any]]:
    with open(checked.path, "rb") as lines:
        return [json.loads(line) for line in lines]


def _image(record: dict[str, Any]) -> CaptionedImage:
    location = dict(record["place"])
    location["window"] = tuple(location["window"]) if location.get("window") else None
    captions, about = tuple(record["captions"]), record["about"]
    return CaptionedImage(record["image_id"], Location(**location), captions, record["label"], about, record["content"])
