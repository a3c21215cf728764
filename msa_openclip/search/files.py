"""An index on disk: segments of vectors and records, and the manifest that names those that are whole.

    INDEX/index.json                what it was built with, and its segments; written last, so its segments are whole
    INDEX/SEGMENT/features.npy      (n, E) float16, normalised global features
    INDEX/SEGMENT/projected.npy     (n, S, D) float16, MSCMAT's projected vectors m; absent without MSCMAT
    INDEX/SEGMENT/records.jsonl     a line per image: id, place, captions, class, geo, meta
    INDEX/SEGMENT/facts.npy         (n,) class, date and bounds out of the records, for filters

Bytes per image above the global vector: 2 S D, and what is known of it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.captioned import CaptionedImage
from ..shards.records import Location

FORMAT = 2  # 1 had no facts.npy


class ImageIndexError(ValueError):
    """An index cannot be built, opened or asked as wanted; the message names the file and the remedy."""


@dataclass(frozen=True)
class Segment:
    """A part of an index that was written at once."""

    name: str
    images: int


@dataclass(frozen=True)
class Manifest:
    """index.json."""

    model: str
    """What the model was loaded as."""
    fingerprint: str
    """Of its weights."""
    segments: tuple[Segment, ...] = ()
    """In the order of their rows."""


def write_segment(
    root: Path,
    name: str,
    records: Iterable[Mapping[str, Any]],
    features: NDArray[np.float16],
    projected: NDArray[np.float16] | None,
) -> Segment:
    """Write a segment under a temporary name, then rename it: a segment that has its name is whole.

    Args:
        root: folder of the index.
        name: of the segment.
        records: one for each row, as `to_record` makes them.
        features: (n, E) normalised global features.
        projected: (n, S, D) vectors m; None for a model without MSCMAT.
    """
    temporary = root / f".{name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    np.save(temporary / "features.npy", features)
    if projected is not None:
        np.save(temporary / "projected.npy", projected)
    rows = list(records)
    with open(temporary / "records.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    np.save(temporary / "facts.npy", _filter_fields(rows))
    os.replace(temporary, root / name)
    return Segment(name, len(features))


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
    content = {"format": FORMAT, **asdict(manifest)}
    temporary = root / ".index.json.tmp"
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, root / "index.json")


def read_manifest(root: Path) -> Manifest:
    """The inverse of `write_manifest`.

    Raises:
        ImageIndexError: index.json is missing, damaged, or of another format.
    """
    path = root / "index.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ImageIndexError(
                f"{root}: an index of format {content['format']}, and this version reads {FORMAT} only. Delete the"
                " folder and build the index again with `msa-openclip index`."
            )
        segments = tuple(Segment(**row) for row in content["segments"])
        return Manifest(content["model"], content["fingerprint"], segments)
    except FileNotFoundError as error:
        raise ImageIndexError(f"{path}: not found; build the index with `msa-openclip index`.") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ImageIndexError(f"{path}: damaged ({type(error).__name__}: {error}); build the index again.") from error


def records(segment: Path) -> Iterator[dict[str, Any]]:
    """The records of a segment, row by row.

    Raises:
        ImageIndexError: they are missing or damaged.
    """
    try:
        with open(segment / "records.jsonl", encoding="utf-8") as file:
            yield from map(json.loads, file)
    except (OSError, json.JSONDecodeError) as error:
        raise damaged(segment, str(error)) from error


def damaged(segment: Path, what: str) -> ImageIndexError:
    """The error that names a damaged segment and what to do about it."""
    index = segment.parent / "index.json"
    return ImageIndexError(f"{segment}: damaged ({what}); delete the segment and {index}, and build the index again.")


def to_record(image: CaptionedImage) -> dict[str, Any]:
    """What is kept of an image, as plain data."""
    return {
        "image_id": image.image_id,
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
        record["image_id"], Location(**location), tuple(record["captions"]), record["label"], record["about"]
    )
