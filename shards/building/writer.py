"""One shard as one independent job: samples in, a finished tar and a few numbers out; the same on every engine."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ..imagery import geotiff
from ..imagery.prepare import EncodedImage, prepare, require_one_size
from ..options import ImageOptions
from ..records import ImageProblem, Location, Rejection, ShardError
from ..running import stopping
from ..storage import json_text, store
from ..storage.sources import Versions, read_ahead
from ..storage.tars import TarSink
from .plan import Sample
from .samples import members


class DiskFull(ShardError):
    """No room for a shard; finished shards are kept and the same command resumes."""


@dataclass(frozen=True, slots=True)
class ShardJob:
    """Everything one worker needs, anywhere."""

    file: str
    split: str
    folder: str
    samples: tuple[Sample, ...]
    image: ImageOptions
    strict: bool = False


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What the manifest says of a shard, and what was left out of it."""

    file: str
    split: str
    samples: int
    images: int
    captions: int
    size_bytes: int
    sha256: str
    sums: tuple[int, ...]
    versions: str
    """Of the images as they were read, so that a build that goes on knows whether they still are what they were."""
    rejections: tuple[Rejection, ...] = ()

    def to_json(self) -> bytes:
        """For the state folder of an unfinished build."""
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def from_json(data: bytes) -> ShardResult:
        """The inverse of `to_json`; a damaged text raises whatever it leads to."""
        row: dict[str, Any] = json_text.parse(data, "the note of a shard")
        rejections = tuple(Rejection(**item) for item in row.pop("rejections"))
        return ShardResult(**row | {"sums": tuple(row["sums"])}, rejections=rejections)

    def entry(self) -> dict[str, Any]:
        """The shard's row in the manifest."""
        row = asdict(self)
        del row["rejections"], row["versions"]
        row["sums"] = " ".join(f"{crc:08x}" for crc in self.sums)
        return row


def write_shard(job: ShardJob) -> ShardResult:
    """Read, prepare and pack the samples of one shard; the file appears under its name only when it is whole.

    Raises:
        DiskFull: the target has no room.
        ImageProblem: an image is unusable and the job is strict.
    """
    rejections: list[Rejection] = []
    images: set[str] = set()
    written = captions = 0
    url = store.join(job.folder, job.file)
    # Before the first is read.
    versions = Versions().of([place for sample in job.samples for place in sample.record.images])
    try:
        with store.atomic_write(url) as file:
            sink = TarSink(file)
            for sample, contents in zip(job.samples, _contents(job), strict=True):
                stopping.check()
                record = sample.record
                try:
                    prepared = [
                        _prepared(place, data, job.image) for place, data in zip(record.images, contents, strict=True)
                    ]
                    require_one_size((image.width, image.height) for image, _ in prepared)
                except ImageProblem as problem:
                    if job.strict:
                        raise ImageProblem(f"{record.source}: {problem}") from problem
                    rejections.append(Rejection(record.source, "unreadable image", str(problem)))
                    continue
                for name, content in members(sample, [image for image, _ in prepared], prepared[0][1]):
                    sink.add(name, content)
                images.add(record.image_id)
                written += 1
                captions += 1 if sample.caption is not None else len(record.captions)
            digest = sink.close()
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DiskFull(
                f"{url}: no space left for this shard. Finished shards are kept:"
                " free some space and run the same command again to go on."
            ) from error
        raise
    return ShardResult(
        job.file, job.split, written, len(images), captions, sink.size, digest, sink.sums, versions, tuple(rejections)
    )


def _contents(job: ShardJob) -> Iterator[list[bytes | Exception | None]]:
    """The bytes of each sample's images in order, None for those that rasterio opens itself."""
    places = [place for sample in job.samples for place in sample.record.images]
    contents = read_ahead([place for place in places if not geotiff.is_geo(place, job.image)])
    for sample in job.samples:
        rasters = (geotiff.is_geo(place, job.image) for place in sample.record.images)
        yield [None if raster else next(contents) for raster in rasters]


def _prepared(
    place: Location, data: bytes | Exception | None, options: ImageOptions
) -> tuple[EncodedImage, dict[str, Any]]:
    if data is None:
        try:
            return geotiff.prepare(place, options)
        except ShardError:
            raise
        except Exception as error:  # GDAL's errors under several types, for damage met late
            raise ImageProblem(f"cannot be decoded: {type(error).__name__}: {error}") from error
    if isinstance(data, Exception):
        reason = "no such file" if isinstance(data, FileNotFoundError) else f"{type(data).__name__}: {data}"
        raise ImageProblem(f"{place.url} cannot be read: {reason}")
    return prepare(data, options), {}
