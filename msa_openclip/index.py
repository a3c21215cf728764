"""An index of images on disk: global vectors, MSCMAT's vectors m in half precision, and what is known of each image.

    INDEX/index.json                what it was built with, and its segments; written last, so its segments are whole
    INDEX/SEGMENT/features.npy      (n, E) float16, normalised global features
    INDEX/SEGMENT/projected.npy     (n, S, D) float16, MSCMAT's projected vectors m; absent without MSCMAT
    INDEX/SEGMENT/records.jsonl     a line per image: id, place, captions, class, geo, meta

A segment's name is a hash of the images in it: a build that was interrupted finds its segments again, and ranks of one
build share segments by number alone.  Bytes per image above the global vector: 2 S D.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import mmap
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .eval_data import CaptionedImage, batches
from .evaluation import Peers
from .loading import LoadedModel
from .scoring import Scorer
from .shards.records import Location

FORMAT = 1


class ImageIndexError(ValueError):
    """An index cannot be built, opened or asked as wanted; the message names the file and the remedy."""


@dataclass(frozen=True)
class Segment:
    """A part of an index that was written at once."""

    name: str
    images: int


def fingerprint(scorer: Scorer) -> str:
    """SHA-256 over all weights by name, so that an index is asked by the model that built it."""
    digest = hashlib.sha256()
    for name, value in sorted(scorer.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def build_index(
    model: LoadedModel,
    images: Sequence[CaptionedImage],
    folder: str,
    *,
    batch_size: int = 64,
    workers: int = 0,
    segment_images: int = 4096,
    peers: Peers | None = None,
    patience_s: float = 3600.0,
) -> int:
    """Add images to an index, making it if there is none; returns how many were new to it.

    Interrupted, the same call goes on where it stopped.  Ranks of a distributed run each build their share; rank 0
    waits for the segments of the others and puts down index.json.

    Args:
        model: the model; the same as before, if the index exists.
        images: what to add; those whose image_id is in the index already are passed over.
        folder: the index.
        segment_images: images a segment, the unit of resuming.
        patience_s: how long rank 0 waits for other ranks without a new segment.
    Raises:
        ImageIndexError: the index was built with another model, an image_id occurs twice, or another rank is gone.
    """
    root, peers = Path(folder), peers or Peers()
    known = read_manifest(root) if (root / "index.json").exists() else _new_manifest(model)
    _check_model(root, known, model)
    old = [Segment(**row) for row in known["segments"]]
    have = {record["image_id"] for segment in old for record in _records(root / segment.name)}
    new = [image for image in images if image.image_id not in have]
    if len({image.image_id for image in new}) != len(new):
        raise ImageIndexError(f"{folder}: an image_id occurs twice among the {len(new)} images to add.")
    parts = [new[start : start + segment_images] for start in range(0, len(new), segment_images)]
    names = [_segment_name(part) for part in parts]
    root.mkdir(parents=True, exist_ok=True)
    for part, name in list(zip(parts, names, strict=True))[peers.rank :: peers.world]:
        if not (root / name).exists():
            _write_segment(model, part, root, name, batch_size, workers)
    if peers.rank == 0:
        _wait_for(root, names, patience_s)
        for left in root.glob(".*.tmp"):  # of builds that were killed
            shutil.rmtree(left, ignore_errors=True)
        segments = old + [Segment(name, len(part)) for name, part in zip(names, parts, strict=True)]
        known["segments"] = [asdict(segment) for segment in segments]
        temporary = root / ".index.json.tmp"
        temporary.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, root / "index.json")
    return len(new)


def _new_manifest(model: LoadedModel) -> dict[str, Any]:
    return {"format": FORMAT, "model": model.spec, "fingerprint": fingerprint(model.scorer), "segments": []}


def _check_model(root: Path, manifest: dict[str, Any], model: LoadedModel) -> None:
    if manifest["fingerprint"] != fingerprint(model.scorer):
        raise ImageIndexError(
            f"{root}: built with other weights ({manifest['model']}) than {model.spec}; scores of two models do not "
            "compare. Load that model, or build a new index."
        )


def _segment_name(images: Sequence[CaptionedImage]) -> str:
    digest = hashlib.sha256()
    for image in images:
        digest.update(json.dumps(_record(image), sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _record(image: CaptionedImage) -> dict[str, Any]:
    return {
        "image_id": image.image_id,
        "place": asdict(image.place),
        "captions": list(image.captions),
        "label": image.label,
        "about": dict(image.about),
    }


def _write_segment(
    model: LoadedModel, images: Sequence[CaptionedImage], root: Path, name: str, batch_size: int, workers: int
) -> None:
    """Encode a segment's images into a temporary folder, which then gets its name."""
    temporary = root / f".{name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    spans = [range(start, min(start + batch_size, len(images))) for start in range(0, len(images), batch_size)]
    features: list[NDArray[np.float16]] = []
    projected: list[NDArray[np.float16]] = []
    for span, pixels in zip(spans, batches(images, model.preprocess, spans, workers), strict=True):
        feature, vectors = model.scorer.project(pixels)
        features.append(_half(feature, images[span.start]))
        if vectors is not None:
            projected.append(_half(vectors, images[span.start]))
    np.save(temporary / "features.npy", np.concatenate(features))
    if projected:
        np.save(temporary / "projected.npy", np.concatenate(projected))
    lines = [json.dumps(_record(image), ensure_ascii=False) for image in images]
    (temporary / "records.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(temporary, root / name)


def _half(values: Tensor, first: CaptionedImage) -> NDArray[np.float16]:
    half = values.cpu().half()
    if not torch.isfinite(half).all():
        raise ImageIndexError(f"batch from image {first.image_id}: vectors that float16 cannot hold.")
    result: NDArray[np.float16] = half.numpy()
    return result


def _wait_for(root: Path, names: Sequence[str], patience_s: float) -> None:
    """Until all segments are there, as long as new ones keep coming."""
    missing, since = list(names), time.monotonic()
    while missing := [name for name in missing if not (root / name).exists()]:
        newest = max((path.stat().st_mtime for path in root.iterdir()), default=0.0)
        if time.monotonic() - since > patience_s and time.time() - newest > patience_s:
            raise ImageIndexError(f"{root}: {len(missing)} segments of other ranks are missing; run the command again.")
        time.sleep(0.05)


def read_manifest(root: Path) -> dict[str, Any]:
    """index.json.

    Raises:
        ImageIndexError: it is missing, damaged, or of another format.
    """
    path = root / "index.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ImageIndexError(f"{path}: format {manifest['format']}, this version reads {FORMAT}; build it again.")
        return dict(manifest)
    except FileNotFoundError as error:
        raise ImageIndexError(f"{path}: not found; build the index with `msa-openclip index`.") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ImageIndexError(f"{path}: damaged ({type(error).__name__}: {error}); build the index again.") from error


def _records(segment: Path) -> Iterator[dict[str, Any]]:
    try:
        with open(segment / "records.jsonl", encoding="utf-8") as file:
            yield from map(json.loads, file)
    except (OSError, json.JSONDecodeError) as error:
        raise _damaged(segment, str(error)) from error


def _damaged(segment: Path, what: str) -> ImageIndexError:
    index = segment.parent / "index.json"
    return ImageIndexError(f"{segment}: damaged ({what}); delete the segment and {index}, and build the index again.")


class ImageRecords(Sequence[CaptionedImage]):
    """The records of all segments as a sequence; a row is parsed when it is asked for."""

    def __init__(self) -> None:
        self._parts: list[tuple[bytes | mmap.mmap, NDArray[np.int64]]] = []
        self._ends: list[int] = []

    def append(self, segment: Path, images: int) -> None:
        """Add the records of a segment.

        Raises:
            ImageIndexError: there are not as many as images.
        """
        path = segment / "records.jsonl"
        try:
            with open(path, "rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise _damaged(segment, f"{path.name}: {error}") from error
        ends = np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == ord("\n"))
        if len(ends) != images:
            raise _damaged(segment, f"{path.name}: {len(ends)} lines, expected {images}")
        self._parts.append((data, np.concatenate([[-1], ends])))
        self._ends.append(len(self) + images)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, row: int) -> CaptionedImage: ...
    @overload
    def __getitem__(self, row: slice) -> list[CaptionedImage]: ...
    def __getitem__(self, row: int | slice) -> CaptionedImage | list[CaptionedImage]:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        if not 0 <= row < len(self):
            raise IndexError(row)  # ends iteration
        number = bisect.bisect_right(self._ends, row)
        data, ends = self._parts[number]
        place = row - (self._ends[number - 1] if number else 0)
        return _image(json.loads(data[ends[place] + 1 : ends[place + 1]]))


class ImageIndex:
    """An index, opened: rows in the order of its segments, vectors mapped from disk.

    Args:
        folder: what `build_index` made.
        model: the model that built it.
    Raises:
        ImageIndexError: there is no index, it is damaged, or another model built it.
    """

    def __init__(self, folder: str, model: LoadedModel) -> None:
        root = Path(folder)
        manifest = read_manifest(root)
        _check_model(root, manifest, model)
        self.folder, self.model = folder, model
        self.segments = tuple(Segment(**row) for row in manifest["segments"])
        self.images = ImageRecords()
        """What is known of every image, read from disk when asked for."""
        self._features: list[NDArray[np.float16]] = []
        self._projected: list[NDArray[np.float16]] = []
        for segment in self.segments:
            path = root / segment.name
            self.images.append(path, segment.images)
            self._features.append(_mapped(path, "features.npy", segment.images))
            if model.scorer.has_match:
                self._projected.append(_mapped(path, "projected.npy", segment.images))
        self._ends = np.cumsum([len(part) for part in self._features])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def features(self) -> Iterator[tuple[int, Tensor]]:
        """First row and global features (n, E) float32 of each segment."""
        for end, part in zip(self._ends, self._features, strict=True):
            yield int(end) - len(part), torch.from_numpy(part.astype(np.float32))

    def feature_rows(self, rows: Tensor) -> Tensor:
        """Global features (n, E) float32 of some rows."""
        return self._rows(self._features, rows)

    def projected_rows(self, rows: Tensor) -> Tensor | None:
        """MSCMAT's vectors m (n, S, D) float32 of some rows."""
        return self._rows(self._projected, rows) if self._projected else None

    def _rows(self, parts: Sequence[NDArray[np.float16]], rows: Tensor) -> Tensor:
        wanted = rows.cpu().numpy()
        segment = np.searchsorted(self._ends, wanted, side="right")
        result = np.empty((len(wanted), *parts[0].shape[1:]), dtype=np.float32)
        for number in np.unique(segment):
            here = segment == number
            result[here] = parts[number][wanted[here] - (self._ends[number] - len(parts[number]))]
        return torch.from_numpy(result)


def _image(record: dict[str, Any]) -> CaptionedImage:
    place = dict(record["place"])
    place["window"] = tuple(place["window"]) if place.get("window") else None
    return CaptionedImage(
        record["image_id"], Location(**place), tuple(record["captions"]), record["label"], record["about"]
    )


def _mapped(segment: Path, file: str, images: int) -> NDArray[np.float16]:
    try:
        values: NDArray[np.float16] = np.load(segment / file, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise _damaged(segment, f"{file}: {error}") from error
    if len(values) != images or values.dtype != np.float16:
        raise _damaged(segment, f"{file}: {len(values)} rows of {values.dtype}, expected {images} of float16")
    return values
