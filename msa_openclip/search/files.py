"""An index on disk: segments of vectors and metadata, and the manifest that names those that are whole.

    INDEX/index.json                what it was built with, and its segments; written last, so its segments are whole
    INDEX/item.json                 the index as a STAC item, with the keys of the embedding proposal
    INDEX/SEGMENT/tiles.parquet     (n) what is known of each image: GeoParquet 1.1, the columns of `schema`
    INDEX/SEGMENT/features.npy      (n, E) float16, normalised global features
    INDEX/SEGMENT/projected.npy     (n, S, D) float16, MSCMAT's projected vectors m; absent without MSCMAT
    INDEX/SEGMENT/rejected.parquet  images that could not be read, and `why`; absent if there are none
    INDEX/SEGMENT/segment.json      how many images, where on Earth, and the checksums of the other files

Rows of a segment lie along a Hilbert curve, where places on Earth are known, and as they came otherwise.  A segment in
which no image could be read has no vectors.  Whatever has its final name is whole and on the disk: files and folders
are flushed before they get it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..data.captioned import CaptionedImage
from ..data.small_files import parse_json, read_json, read_text
from ..shards.storage import store
from .checksums import CheckedFile, checksums
from .places import EARTH, Box
from .schema import Product, extent, hilbert_order, parquet, to_table

FORMAT = 4
CONVERTIBLE = 3
"""The format before, of records in JSON lines; `convert` reads it."""
TILES, REJECTED = "tiles.parquet", "rejected.parquet"
_SEGMENT_NAME = re.compile(r"[0-9a-f]{16}")
SEGMENT_FILE = "segment.json"

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

    def product(self, features: NDArray[np.float16] | None, projected: NDArray[np.float16] | None) -> Product:
        """What vectors of this model are: features (n, E), vectors m (n, S, D)."""
        return Product(
            model=self.model,
            fingerprint=self.fingerprint,
            settings=self.settings,
            embed_dim=0 if features is None else features.shape[1],
            match_shape=None if projected is None else (projected.shape[1], projected.shape[2]),
        )


def write_segment(
    root: Path,
    name: str,
    manifest: Manifest,
    tiles: pa.Table,
    features: NDArray[np.float16] | None,
    projected: NDArray[np.float16] | None,
    rejected: pa.Table | None = None,
) -> None:
    """Write a segment under a temporary name, then rename it: a segment that has its name is whole.

    Where another process has put the same segment in the meantime, its one stays: equal names mean equal content.

    Args:
        root: folder of the index.
        name: of the segment.
        manifest: what the vectors are of.
        tiles: a row for each image, of `schema.to_table`.
        features: (n, E) normalised global features; None if there is no row.
        projected: (n, S, D) vectors m; None for a model without MSCMAT, too.
        rejected: the images that could not be read, with a column `why`.
    """
    temporary = root / f".{name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    order = hilbert_order(tiles)
    product = manifest.product(features, projected)
    (temporary / TILES).write_bytes(parquet(tiles.take(order), product))
    for file, vectors in (("features.npy", features), ("projected.npy", projected)):
        if vectors is not None:
            np.save(temporary / file, vectors[order])
    if rejected is not None and len(rejected):
        (temporary / REJECTED).write_bytes(parquet(rejected, product))
    files = {path.name: checksums(path) for path in sorted(temporary.iterdir())}
    content = json.dumps({"images": len(tiles), "bbox": extent(tiles), "files": files})
    (temporary / SEGMENT_FILE).write_text(content + "\n", encoding="utf-8")
    store.sync(str(temporary))
    try:
        store.rename(str(temporary), str(root / name))
    except OSError:
        if not is_written(root, name):
            raise
        shutil.rmtree(temporary)


def rejected_table(images: Sequence[CaptionedImage], why: Sequence[str]) -> pa.Table:
    """What is kept of images that could not be read."""
    return to_table(images).append_column("why", pa.array(why, pa.string()))


def is_written(root: Path, name: str) -> bool:
    """Whether a segment is there, which means: whole."""
    return (root / name / SEGMENT_FILE).is_file()


def read_segment(root: Path, name: str) -> Segment:
    """What the manifest has to say of a segment that `write_segment` wrote.

    Raises:
        ImageIndexError: its description is damaged.
    """
    return _described(root / name)[0]


def _described(folder: Path) -> tuple[Segment, Mapping[str, Any]]:
    """What a segment.json is of, and what is in it."""
    text = or_damaged(folder, lambda: read_text(folder / SEGMENT_FILE))
    content = or_damaged(folder, lambda: dict(parse_json(text, SEGMENT_FILE)))
    images = or_damaged(folder, lambda: int(content["images"]))
    return Segment(folder.name, images, hashlib.sha256(text.encode()).hexdigest()), content


def _description(root: Path, segment: Segment) -> Mapping[str, Any]:
    """The content of segment.json, once it is what the manifest says."""
    found, content = _described(root / segment.name)
    if found != segment:
        raise damaged(root / segment.name, f"{SEGMENT_FILE} is not what was written")
    return content


def checked_files(root: Path, segment: Segment) -> dict[str, CheckedFile]:
    """The files of a segment by name, none of them read yet.

    Raises:
        ImageIndexError: a file is missing or of another size, or the description of the segment is another.
    """
    folder, content = root / segment.name, _description(root, segment)
    files = or_damaged(folder, lambda: dict(content["files"]))
    wanted = {TILES, *(("features.npy",) if segment.images else ())}
    if not wanted <= files.keys() <= {*wanted, "projected.npy", REJECTED}:
        raise damaged(folder, f"{SEGMENT_FILE} names the files {', '.join(files)}")
    return or_damaged(folder, lambda: {name: CheckedFile(folder / name, sums) for name, sums in files.items()})


def segment_extent(root: Path, segment: Segment) -> Box | None:
    """The box around all images of a segment; None if no place is known, all of Earth if an earlier version wrote it.

    Raises:
        ImageIndexError: the description of the segment is another, or damaged.
    """
    found = _description(root, segment).get("bbox", EARTH)
    return None if found is None else or_damaged(root / segment.name, lambda: _box(found))


def _box(sides: Sequence[float]) -> Box:
    west, south, east, north = map(float, sides)
    return west, south, east, north


def or_damaged(segment: Path, read: Callable[[], T]) -> T:
    """The result of `read`, or the error that names the segment."""
    try:
        return read()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise damaged(segment, f"{type(error).__name__}: {error}") from error


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Put down index.json in one step, once all its segments are written."""
    content = sealed({"format": FORMAT, **asdict(manifest)})
    store.write_bytes(str(root / "index.json"), (json.dumps(content, indent=2) + "\n").encode())


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of index.json with its own checksum, as plain data."""
    plain = {name: value for name, value in json.loads(json.dumps(content)).items() if name != "checksum"}
    return {**plain, "checksum": hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()}


def is_candidates_file(name: str) -> bool:
    """Whether a file of an index is FAISS's, or the checksums of one."""
    return bool(re.fullmatch(r"(ivfpq|hnsw)-[0-9a-f]{12}\.faiss(\.json)?", name))


def remove_left_over(root: Path) -> None:
    """Remove what was left half written by those that were killed: our own temporary names alone, and no links."""
    for left in root.iterdir():
        if left.is_symlink():
            continue
        if re.fullmatch(r"\.[0-9a-f]{16}\.[0-9]+\.tmp", left.name):
            shutil.rmtree(left, ignore_errors=True)
        elif is_candidates_file(store.target_of_temporary(left.name) or "") and left.is_file():
            left.unlink(missing_ok=True)


def read_manifest(root: Path, expected: int = FORMAT) -> Manifest:
    """The inverse of `write_manifest`.

    Raises:
        ImageIndexError: index.json is missing, damaged, or of another format than expected.
    """
    path = root / "index.json"
    try:
        content = read_json(path)
        if content["format"] != expected:
            remedy = (
                f"Convert it with `msa-openclip index convert {root} NEW`."
                if content["format"] == CONVERTIBLE != expected
                else "Delete the folder and build the index again with `msa-openclip index`."
            )
            raise ImageIndexError(f"{root}: an index of format {content['format']}, expected {expected}. {remedy}")
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


def open_parquet(segment: Path, checked: CheckedFile) -> pq.ParquetFile:
    """A Parquet file of a segment, compared with its checksums first.

    Raises:
        ImageIndexError: it is damaged.
    """
    try:
        checked.check_all()
        return pq.ParquetFile(pa.BufferReader(pa.py_buffer(checked.data)))
    except (OSError, ValueError, TypeError, pa.ArrowException) as error:
        raise damaged(segment, f"{checked.path.name}: {error}") from error


def read_columns(
    segment: Path, file: pq.ParquetFile, names: Sequence[str], rows: int | None = None, group: int | None = None
) -> pa.Table:
    """Some columns of a Parquet file of a segment, or of one of its row groups, and `rows` of them.

    Raises:
        ImageIndexError: it is damaged, or another number of rows is there.
    """
    try:
        there = (file.metadata if group is None else file.metadata.row_group(group)).num_rows
        if rows is not None and there != rows:  # before anything is decoded: any number may stand there
            raise ValueError(f"{there} rows, expected {rows}")
        read = file.read if group is None else partial(file.read_row_group, group)
        table = read(columns=list(names), use_threads=False).select(list(names))
        if rows is not None and len(table) != rows:
            raise ValueError(f"{len(table)} rows, expected {rows}")
        return table
    except (OSError, ValueError, KeyError, TypeError, IndexError, pa.ArrowException) as error:
        raise damaged(segment, f"Parquet: {error}") from error


def damaged(segment: Path, what: str) -> ImageIndexError:
    """The error that names a damaged segment and what to do about it."""
    index = segment.parent / "index.json"
    return ImageIndexError(f"{segment}: damaged ({what}); delete the segment and {index}, and build the index again.")
