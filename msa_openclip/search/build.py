"""Build an index of images: global vectors, MSCMAT's vectors m in half precision, what is known of each.

A segment's name is a hash of the format, the model and its images with their content: a build that was interrupted
finds its own segments again, never those of another model or of images that have been replaced since, and ranks of one
build share segments by number alone.  The files are those of `files`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ..data.captioned import CaptionedImage, EvalDataError
from ..data.pixels import batch_spans, batches, image_pixels
from ..data.readers import content_of
from ..data.repeats import identity, without_repeats
from ..data.streams import StreamError
from ..distributed import Peers
from ..evaluation.loading import LoadedModel
from ..shards.records import Location
from ..shards.storage import store
from ..shards.storage.locking import one_writer
from .files import (
    FORMAT,
    REJECTED,
    TILES,
    ImageIndexError,
    Manifest,
    checked_files,
    is_written,
    open_parquet,
    read_columns,
    read_manifest,
    read_segment,
    rejected_table,
    remove_left_over,
    write_manifest,
    write_segment,
)
from .fingerprint import check_model, fingerprint, settings
from .item import ITEM, write_item
from .known_models import remember
from .options import SEGMENT_IMAGES
from .ranks import wait_for_ranks, working
from .schema import SchemaError, locations, to_table

_NAMED = 20
"""So many images that cannot be read are named in the log."""
_log = logging.getLogger(__name__)


def build_index(
    model: LoadedModel,
    images: Sequence[CaptionedImage],
    folder: str,
    *,
    batch_size: int = 64,
    workers: int = 0,
    segment_images: int = SEGMENT_IMAGES,
    peers: Peers | None = None,
    patience_s: float = 300.0,
    progress: bool = False,
) -> int:
    """Add images to an index, making it if there is none; returns how many were new to it.

        build_index(load("MSA-ViT-B=epoch_9.pt"), read_folder("tiles"), "tiles.index")

    Interrupted, the same call goes on where it stopped.  Images that cannot be read are left out, and the log names
    them.  Ranks of a distributed run each build their share; rank 0 waits for the segments of the others and puts down
    index.json.  An image is known by its id and its content: two sets may use the same names.

    Args:
        model: the model; the same as before, if the index exists.
        images: what to add; those that are in the index already are passed over.
        folder: the index.
        segment_images: images a segment, the unit of resuming.
        patience_s: how long rank 0 waits for another rank that shows no sign of life.
        progress: a bar on stderr, of rank 0.
    Raises:
        ImageIndexError: the index was built with another model, an image occurs twice or has changed since it was
            indexed or has a name that is not Unicode, another rank is gone, or a number is out of range.
        EvalDataError: an image is of another number of dates than the model takes.
        BeingWritten: another process is writing to the index.
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("workers", workers, 0),
        ("segment_images", segment_images, 1),
    ):
        if value < least:
            raise ImageIndexError(f"{name}: {value} must be at least {least}.")
    model.scorer.require_dates(images)
    root, peers = Path(folder), peers or Peers()
    root.mkdir(parents=True, exist_ok=True)
    # Other ranks write segments only, which are equal whoever writes them; what becomes of them rank 0 decides.
    with one_writer(folder) if peers.rank == 0 else nullcontext(), working(root, peers):
        exists = (root / "index.json").exists()
        known = read_manifest(root) if exists else Manifest(model.spec, fingerprint(model.scorer), settings(model))
        check_model(root, known, model, appending=True)
        remember(model)
        new = _new_images(root, known, images)
        parts = [new[span.start : span.stop] for span in batch_spans(len(new), segment_images)]
        names = [segment_name(known, part) for part in parts]
        mine = list(zip(parts, names, strict=True))[peers.rank :: peers.world_size]
        total, shown = sum(len(part) for part, _ in mine), progress and peers.rank == 0
        with tqdm(total=total, desc="indexing", unit=" images", leave=False, disable=not shown) as bar:
            for part, name in mine:
                if is_written(root, name):
                    bar.update(len(part))
                else:
                    _encode_segment(model, part, root, name, known, batch_size, workers, bar)
        if peers.rank:
            return len(new)
        wait_for_ranks(root, names, peers, patience_s)
        remove_left_over(root)
        added = [read_segment(root, name) for name in names]
        if added or not exists or not (root / ITEM).exists():
            publish(root, replace(known, segments=(*known.segments, *added)))
        return sum(segment.images for segment in added)


def publish(root: Path, manifest: Manifest) -> None:
    """Put down what an index is, once all its segments are written: as a STAC item, then for good."""
    write_item(root, manifest)
    write_manifest(root, manifest)


class Known:
    """The images of an index: which ones, the spots where they lie, and the version of each scene."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self._root = root
        self.images: set[Hashable] = set()
        self._spots: set[Location] = set()
        self._scenes: dict[str, str] = {}
        for segment in manifest.segments:
            folder, files = root / segment.name, checked_files(root, segment)
            for file in (TILES, REJECTED):
                if file not in files:
                    continue
                parquet = open_parquet(folder, files[file])
                rows = read_columns(folder, parquet, ["id", "content", "source", "place", "window"])
                content = [text or "" for text in rows["content"].to_pylist()]
                found = locations(rows)
                self.images.update(map(identity, rows["id"].to_pylist(), content, found))
                if file == TILES:
                    spots = [_spot(place) for place in found]
                    self._spots.update(spots)
                    self._scenes.update(
                        (spot.url, text) for spot, text in zip(spots, content, strict=True) if spot.window and text
                    )

    def has(self, image: CaptionedImage) -> bool:
        """Whether this very image is there."""
        return identity(image.image_id, image.content, image.location) in self.images

    def add(self, image: CaptionedImage) -> None:
        """From now on it is there."""
        self.images.add(identity(image.image_id, image.content, image.location))

    def require_unchanged(self, new: Sequence[CaptionedImage]) -> None:
        """Refuse new images that lie where others lay when they were indexed, and tiles of scenes that have changed.

        Raises:
            ImageIndexError: there are some.
        """
        changed = [image for image in new if self._is_changed(image)]
        if changed:
            raise ImageIndexError(
                f"{self._root}: {len(changed)} images are not what they were when they were indexed, first "
                f"{changed[0].location.url}: {changed[0].image_id}. Build a new index."
            )

    def _is_changed(self, image: CaptionedImage) -> bool:
        spot = _spot(image.location)
        known = self._scenes.get(spot.url) if spot.window and image.content else None
        return known != image.content if known else spot in self._spots


def _new_images(root: Path, manifest: Manifest, images: Sequence[CaptionedImage]) -> list[CaptionedImage]:
    """The images that are not in the index yet, with their content.

    Raises:
        ImageIndexError: one occurs twice, or lies where another image was when it was indexed.
    """
    known = Known(root, manifest)
    with_content = [image if image.content else replace(image, content=content_of(image.location)) for image in images]
    new = [image for image in with_content if not known.has(image)]
    _, repeated = without_repeats(new)
    if repeated:
        raise ImageIndexError(
            f"{root}: image {repeated[0].file!r} occurs twice among the {len(new)} to add; leave one of them out."
        )
    known.require_unchanged(new)
    return new


def _spot(place: Location) -> Location:
    """Where an image lies, however its file is called from the current folder."""
    path = os.path.abspath(store.local_path(place.url)) if store.is_local(place.url) else place.url
    return replace(place, url=path, size=None)


def segment_name(manifest: Manifest, images: Sequence[CaptionedImage]) -> str:
    """A hash of the format, the model and the images with their content."""
    digest = hashlib.sha256(f"format {FORMAT}".encode())  # a segment of another format is no segment of ours
    digest.update(json.dumps([manifest.fingerprint, dict(manifest.settings)], sort_keys=True).encode())
    for image in images:
        digest.update(json.dumps([asdict(image), image.content], sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _encode_segment(
    model: LoadedModel,
    images: Sequence[CaptionedImage],
    root: Path,
    name: str,
    manifest: Manifest,
    batch_size: int,
    workers: int,
    bar: tqdm[Any],
) -> None:
    try:
        tiles, rejected = to_table(images), None  # before anything is encoded: a name may be refused
    except SchemaError as error:
        raise ImageIndexError(f"{root}: {error}") from error
    done = bar.n
    try:
        features, projected = _encode(model, images, batch_size, workers, bar)
    except EvalDataError:
        images, bad, why = _readable(model, images)
        tiles, rejected = to_table(images), rejected_table(bad, why)
        bar.update(done + len(bad) - bar.n)
        features, projected = _encode(model, images, batch_size, workers, bar)
    write_segment(root, name, manifest, tiles, features, projected, rejected)


def _encode(
    model: LoadedModel, images: Sequence[CaptionedImage], batch_size: int, workers: int, bar: tqdm[Any]
) -> tuple[NDArray[np.float16] | None, NDArray[np.float16] | None]:
    """Features (n, E) and, with MSCMAT, vectors m (n, S, D); None where there are none."""
    spans = batch_spans(len(images), batch_size)
    features: list[NDArray[np.float16]] = []
    projected: list[NDArray[np.float16]] = []
    for span, pixels in zip(spans, batches(images, model.preprocess, spans, workers), strict=True):
        feature, vectors = model.scorer.project(pixels)
        features.append(_half(feature, images[span.start]))
        if vectors is not None:
            projected.append(_half(vectors, images[span.start]))
        bar.update(len(span))
    return np.concatenate(features) if features else None, np.concatenate(projected) if projected else None


def _readable(
    model: LoadedModel, images: Sequence[CaptionedImage]
) -> tuple[list[CaptionedImage], list[CaptionedImage], list[str]]:
    """The images that can be read, the others, and why they cannot; the log names the first of them.

    Raises:
        EvalDataError: a store cannot be reached, which says nothing of the image.
    """
    readable: list[CaptionedImage] = []
    rejected: list[CaptionedImage] = []
    why: list[str] = []
    for image in images:
        try:
            image_pixels(image, model.preprocess)
            readable.append(image)
        except EvalDataError as error:
            if isinstance(error.__cause__, StreamError) and not store.is_local(image.location.url):
                raise
            rejected.append(image)
            why.append(str(error))
            if len(rejected) <= _NAMED:
                _log.warning("Left out of the index: %s", error)
    _log.warning(
        "%d of %d images of a segment cannot be read and are left out of the index.", len(rejected), len(images)
    )
    return readable, rejected, why


def _half(values: Tensor, first: CaptionedImage) -> NDArray[np.float16]:
    half = values.cpu().half()
    if not torch.isfinite(half).all():
        raise ImageIndexError(f"batch from image {first.image_id}: vectors that float16 cannot hold.")
    result: NDArray[np.float16] = half.numpy()
    return result
