"""An index of the format before this one, records in JSON lines and `facts.npy`, as an index of today's format.

    convert_index("old.index", "new.index")

Vectors are taken as they are, so no model is needed; every file is compared with its checksums first.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

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
    Manifest,
    Segment,
    is_written,
    or_damaged,
    read_manifest,
    read_segment,
    rejected_table,
    write_segment,
)
from .schema import to_table
from .vectors import Vectors


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


def _convert(source: Path, segment: Segment, root: Path, manifest: Manifest) -> str:
    """Write a segment, unless it is there; returns its new name."""
    folder = source / segment.name
    files = or_damaged(folder, partial(_checked, folder, segment))
    images = [image for image, _ in or_damaged(folder, partial(_lines, files["records.jsonl"]))]
    rejected = or_damaged(folder, partial(_lines, files["rejected.jsonl"]))
    # As many rows as there are records, which may be fewer than were written.
    features, projected = (
        Vectors(folder, files[name], len(images)).block(0, len(images)) if name in files and segment.images else None
        for name in ("features.npy", "projected.npy")
    )
    bad = [image for image, _ in rejected]
    name = segment_name(manifest, [*images, *bad])
    if not is_written(root, name):
        why = rejected_table(bad, [reason for _, reason in rejected])
        write_segment(root, name, manifest, to_table(images), features, projected, why)
    return name


def _checked(folder: Path, segment: Segment) -> dict[str, CheckedFile]:
    text = read_text(folder / SEGMENT_FILE)
    if hashlib.sha256(text.encode()).hexdigest() != segment.checksum:
        raise ChecksumError(f"{SEGMENT_FILE} is not what was written")
    files = {name: CheckedFile(folder / name, sums) for name, sums in parse_json(text, SEGMENT_FILE)["files"].items()}
    for checked in files.values():
        checked.check_all()
    return files


def _lines(checked: CheckedFile) -> list[tuple[CaptionedImage, str]]:
    """The images of a file, and why each could not be read, if so."""
    found = []
    with open(checked.path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            row = parse_json(line, f"{checked.path.name} line {number}")
            found.append((_image(row), str(row.get("why", ""))))
    return found


def _image(record: dict[str, Any]) -> CaptionedImage:
    location = dict(record["place"])
    location["window"] = tuple(location["window"]) if location.get("window") else None
    captions, about = tuple(record["captions"]), record["about"]
    return CaptionedImage(record["image_id"], Location(**location), captions, record["label"], about, record["content"])
