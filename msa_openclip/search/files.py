"""An index on disk: segments of vectors and records, and the manifest that names those that are whole.

    INDEX/index.json                what it was built with, and its segments; written last, so its segments are whole
    INDEX/SEGMENT/features.npy      (n, E) float16, normalised global features
    INDEX/SEGMENT/projected.npy     (n, S, D) float16, MSCMAT's projected vectors m; absent without MSCMAT
    INDEX/SEGMENT/records.jsonl     a line per image: id, content, place, captions, class, geo, meta
    INDEX/SEGMENT/facts.npy         (n,) class, date and bounds out of the records, for filters
    INDEX/SEGMENT/rejected.jsonl    a line per image that could not be read: id, content, place, why
    INDEX/SEGMENT/segment.json      how many images, and the checksums of the other files

Bytes per image above the global vector: 2 S D, and what is known of it.  A segment in which no image could be read has
no vectors.  Whatever has its final name is whole and on the disk: files and folders are flushed before they get it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..data.captioned import CaptionedImage
from ..data.small_files import parse_json, read_json, read_text
from ..shards.records import Location
from ..shards.storage import store
from .checksums import CheckedFile, checksums

FORMAT = 3  # 2 had neither checksums nor the content of images, 1 no facts.npy
_SEGMENT_NAME = re.compile(r"[0-9a-f]{16}")
_SEGMENT_FILE = "segment.json"

T = TypeVar("T")


class ImageIndexError(ValueError):
    """An index cannot be built, opened or asked as wanted; the message names the file and the remedy."""


@dataclass(frozen=True)
class Segment:
    """A part of an index that was written at once."""

    name: str
    images: int
    checksum: str
    """SHA-256 of its segment.json, which holds the checksums of its files."""


@dataclass(frozen=True)
class Manifest:
    """index.json."""

    model: str
    """What the model was loaded as; a hint for people, nothing is ever loaded from it."""
    fingerprint: str
    """Of its weights."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What else decides what the vectors are, as `fingerprint.settings` tells it."""
    segments: tuple[Segment, ...] = ()
    """In the order of their rows."""


def write_segment(
    root: Path,
    name: str,
    records: Sequence[Mapping[str, Any]],
    rejected: Sequence[Mapping[str, Any]],
    features: NDArray[np.float16] | None,
    projected: NDArray[np.float16] | None,
) -> None:
    """Write a segment under a temporary name, then rename it: a segment that has its name is whole.

    Where another process has put the same segment in the meantime, its one stays: equal names mean equal content.

    Args:
        root: folder of the index.
        name: of the segment.
        records: one for each row, as `to_record` makes them.
        rejected: one for each image that could not be read.
        features: (n, E) normalised global features; None if there is no row.
        projected: (n, S, D) vectors m; None for a model without MSCMAT, too.
    """
    temporary = root / f".{name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    _write_lines(temporary / "records.jsonl", records)
    _write_lines(temporary / "rejected.jsonl", rejected)
    if features is not None:
        np.save(temporary / "features.npy", features)
        np.save(temporary / "facts.npy", _filter_fields(records))
    if projected is not None:
        np.save(temporary / "projected.npy", projected)
    files = {path.name: checksums(path) for path in sorted(temporary.iterdir())}
    content = json.dumps({"images": len(records), "files": files})
    (temporary / _SEGMENT_FILE).write_text(content + "\n", encoding="utf-8")
    store.sync(str(temporary))
    try:
        store.rename(str(temporary), str(root / name))
    except OSError:
        if not is_written(root, name):
            raise
        shutil.rmtree(temporary)


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")  # ASCII, lone surrogates too


def is_written(root: Path, name: str) -> bool:
    """Whether a segment is there, which means: whole."""
    return (root / name / _SEGMENT_FILE).is_file()


def read_segment(root: Path, name: str) -> Segment:
    """What the manifest has to say of a segment that `write_segment` wrote.

    Raises:
        ImageIndexError: its description is damaged.
    """
    text = _or_damaged(root / name, lambda: read_text(root / name / _SEGMENT_FILE))
    images = _or_damaged(root / name, lambda: int(parse_json(text, _SEGMENT_FILE)["images"]))
    return Segment(name, images, hashlib.sha256(text.encode()).hexdigest())


def checked_files(root: Path, segment: Segment) -> dict[str, CheckedFile]:
    """The files of a segment by name, none of them read yet.

    Raises:
        ImageIndexError: a file is missing or of another size, or the description of the segment is another.
    """
    folder = root / segment.name
    if read_segment(root, segment.name) != segment:
        raise damaged(folder, f"{_SEGMENT_FILE} is not what was written")
    files = _or_damaged(folder, lambda: dict(read_json(folder / _SEGMENT_FILE)["files"]))
    wanted = {"records.jsonl", "rejected.jsonl", *(("features.npy", "facts.npy") if segment.images else ())}
    if not wanted <= files.keys() <= {*wanted, "projected.npy"}:
        raise damaged(folder, f"{_SEGMENT_FILE} names the files {', '.join(files)}")
    return _or_damaged(folder, lambda: {name: CheckedFile(folder / name, sums) for name, sums in files.items()})


def _or_damaged(segment: Path, read: Callable[[], T]) -> T:
    """The result of `read`, or the error that names the segment."""
    try:
        return read()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise damaged(segment, f"{type(error).__name__}: {error}") from error


def _filter_fields(rows: Sequence[Mapping[str, Any]]) -> NDArray[np.void]:
    """What filters look at, a row each; empty texts and NaN where nothing is known."""
    labels = [row["label"] or "" for row in rows]
    dates = [str((row["about"].get("meta") or {}).get("date") or "") for row in rows]
    bounds = [(row["about"].get("geo") or {}).get("bounds") or [np.nan] * 4 for row in rows]
    width = {name: max([1, *map(len, texts)]) for name, texts in (("label", labels), ("date", dates))}
    filter_fields = np.zeros(len(rows), [*((name, f"U{size}") for name, size in width.items()), ("bounds", "f8", 4)])
    filter_fields["label"], filter_fields["date"], filter_fields["bounds"] = labels, dates, bounds
    return filter_fields


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Put down index.json in one step, once all its segments are written."""
    content = sealed({"format": FORMAT, **asdict(manifest)})
    store.write_bytes(str(root / "index.json"), (json.dumps(content, indent=2) + "\n").encode())


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of index.json with its own checksum, as plain data."""
    plain = {name: value for name, value in json.loads(json.dumps(content)).items() if name != "checksum"}
    return {**plain, "checksum": hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()}


def remove_left_over(root: Path) -> None:
    """Remove what killed builds left half written: folders of our own temporary names alone, and no links."""
    for left in root.iterdir():
        if re.fullmatch(r"\.[0-9a-f]{16}\.[0-9]+\.tmp", left.name) and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)


def read_manifest(root: Path) -> Manifest:
    """The inverse of `write_manifest`.

    Raises:
        ImageIndexError: index.json is missing, damaged, or of another format.
    """
    path = root / "index.json"
    try:
        content = read_json(path)
        if content["format"] != FORMAT:
            raise ImageIndexError(
                f"{root}: an index of format {content['format']}, and this version reads {FORMAT} only. Delete the"
                " folder and build the index again with `msa-openclip index`."
            )
        if sealed(content) != content:
            raise ValueError("not what was written")
        segments = tuple(_segment(row) for row in content["segments"])
        if len({segment.name for segment in segments}) != len(segments):
            raise ValueError("a segment is named twice")
        return Manifest(str(content["model"]), str(content["fingerprint"]), dict(content["settings"]), segments)
    except FileNotFoundError as error:
        raise ImageIndexError(f"{path}: not found; build the index with `msa-openclip index`.") from error
    except ImageIndexError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ImageIndexError(f"{path}: damaged ({type(error).__name__}: {error}); build the index again.") from error


def _segment(row: Mapping[str, Any]) -> Segment:
    """A segment out of index.json, whoever wrote it: its name leads to no other folder."""
    segment = Segment(**row)
    if not (isinstance(segment.name, str) and _SEGMENT_NAME.fullmatch(segment.name)):
        raise ValueError(f"{segment.name!r} is no name of a segment")
    if type(segment.images) is not int or segment.images < 0:
        raise ValueError(f"segment {segment.name} has {segment.images!r} images")
    return segment


def read_lines(root: Path, segment: Segment, file: str) -> Iterator[dict[str, Any]]:
    """The rows of records.jsonl or rejected.jsonl of a segment.

    Raises:
        ImageIndexError: they are missing or damaged.
    """
    folder = root / segment.name
    checked = checked_files(root, segment)[file]
    _or_damaged(folder, checked.check_all)
    with open(folder / file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            row = _or_damaged(folder, partial(parse_json, line, f"{file} line {number}"))
            if not (isinstance(row, dict) and isinstance(row.get("image_id"), str)):
                raise damaged(folder, f"{file} line {number}: no record of an image")
            yield row


def damaged(segment: Path, what: str) -> ImageIndexError:
    """The error that names a damaged segment and what to do about it."""
    index = segment.parent / "index.json"
    return ImageIndexError(f"{segment}: damaged ({what}); delete the segment and {index}, and build the index again.")


def to_record(image: CaptionedImage) -> dict[str, Any]:
    """What is kept of an image, as plain data."""
    return {
        "image_id": image.image_id,
        "content": image.content,
        "place": asdict(image.location),
        "captions": list(image.captions),
        "label": image.label,
        "about": dict(image.metadata),
    }


def from_record(record: Mapping[str, Any]) -> CaptionedImage:
    """The inverse of `to_record`."""
    location = dict(record["place"])
    location["window"] = tuple(location["window"]) if location.get("window") else None
    return CaptionedImage(
        record["image_id"],
        Location(**location),
        tuple(record["captions"]),
        record["label"],
        dict(record["about"]),
        record["content"],
    )
