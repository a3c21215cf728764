"""Build an index of images: global vectors, MSCMAT's vectors m in half precision, what is known of each.

A segment's name is a hash of its images and the format: a build that was interrupted finds its segments again, and
ranks of one build share segments by number alone.  The files are those of `index_files`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ..data.captioned import CaptionedImage
from ..data.pixels import batch_spans, batches
from ..distributed import Peers
from ..evaluation.loading import LoadedModel
from .files import (
    FORMAT,
    ImageIndexError,
    Manifest,
    Segment,
    read_manifest,
    records,
    to_record,
    write_manifest,
    write_segment,
)
from .fingerprint import check_model, fingerprint
from .options import SEGMENT_IMAGES


def build_index(
    model: LoadedModel,
    images: Sequence[CaptionedImage],
    folder: str,
    *,
    batch_size: int = 64,
    workers: int = 0,
    segment_images: int = SEGMENT_IMAGES,
    peers: Peers | None = None,
    patience_s: float = 3600.0,
    progress: bool = False,
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
        progress: a bar on stderr, of rank 0.
    Raises:
        ImageIndexError: the index was built with another model, an image_id occurs twice, or another rank is gone.
    """
    root, peers = Path(folder), peers or Peers()
    exists = (root / "index.json").exists()
    known = read_manifest(root) if exists else Manifest(model.spec, fingerprint(model.scorer))
    check_model(root, known, model)
    have = {record["image_id"] for segment in known.segments for record in records(root / segment.name)}
    new = [image for image in images if image.image_id not in have]
    if len({image.image_id for image in new}) != len(new):
        raise ImageIndexError(f"{folder}: an image_id occurs twice among the {len(new)} images to add.")
    parts = [new[start : start + segment_images] for start in range(0, len(new), segment_images)]
    names = [_segment_name(part) for part in parts]
    root.mkdir(parents=True, exist_ok=True)
    mine = list(zip(parts, names, strict=True))[peers.rank :: peers.world_size]
    total, shown = sum(len(part) for part, _ in mine), progress and peers.rank == 0
    with tqdm(total=total, desc="indexing", unit=" images", leave=False, disable=not shown) as bar:
        for part, name in mine:
            if (root / name).exists():
                bar.update(len(part))
            else:
                _encode_segment(model, part, root, name, batch_size, workers, bar)
    if peers.rank == 0:
        _wait_for(root, names, patience_s)
        for left in root.glob(".*.tmp"):  # of builds that were killed
            shutil.rmtree(left, ignore_errors=True)
        added = (Segment(name, len(part)) for name, part in zip(names, parts, strict=True))
        write_manifest(root, replace(known, segments=(*known.segments, *added)))
    return len(new)


def _segment_name(images: Sequence[CaptionedImage]) -> str:
    digest = hashlib.sha256(f"format {FORMAT}".encode())  # a segment of another format is no segment of ours
    for image in images:
        digest.update(json.dumps(to_record(image), sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _encode_segment(
    model: LoadedModel,
    images: Sequence[CaptionedImage],
    root: Path,
    name: str,
    batch_size: int,
    workers: int,
    bar: tqdm[Any],
) -> None:
    spans = batch_spans(len(images), batch_size)
    features: list[NDArray[np.float16]] = []
    projected: list[NDArray[np.float16]] = []
    for span, pixels in zip(spans, batches(images, model.preprocess, spans, workers), strict=True):
        feature, vectors = model.scorer.project(pixels)
        features.append(_half(feature, images[span.start]))
        if vectors is not None:
            projected.append(_half(vectors, images[span.start]))
        bar.update(len(span))
    vectors_or_none = np.concatenate(projected) if projected else None
    write_segment(root, name, map(to_record, images), np.concatenate(features), vectors_or_none)


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
