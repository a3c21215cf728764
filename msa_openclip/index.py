"""Build an index of images on disk: global vectors, MSCMAT's vectors m in half precision, what is known of each.

    INDEX/index.json                what it was built with, and its segments; written last, so its segments are whole
    INDEX/SEGMENT/features.npy      (n, E) float16, normalised global features
    INDEX/SEGMENT/projected.npy     (n, S, D) float16, MSCMAT's projected vectors m; absent without MSCMAT
    INDEX/SEGMENT/records.jsonl     a line per image: id, place, captions, class, geo, meta

A segment's name is a hash of the images in it: a build that was interrupted finds its segments again, and ranks of one
build share segments by number alone.  Bytes per image above the global vector: 2 S D.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .eval_data import CaptionedImage, batches
from .evaluation import Peers
from .loading import LoadedModel
from .scoring import Scorer

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
    check_model(root, known, model)
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


def check_model(root: Path, manifest: dict[str, Any], model: LoadedModel) -> None:
    """Raise ImageIndexError unless the index was built with this model."""
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
        raise damaged(segment, str(error)) from error


def damaged(segment: Path, what: str) -> ImageIndexError:
    """The error that names a damaged segment and what to do about it."""
    index = segment.parent / "index.json"
    return ImageIndexError(f"{segment}: damaged ({what}); delete the segment and {index}, and build the index again.")
