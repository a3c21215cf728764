"""Captioned images from shards of either layout, caption files, CSV and folders, wherever they lie."""

from __future__ import annotations

import hashlib
import io
import reprlib
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import IO, Any

from braceexpand import braceexpand

from ..shards.imagery import prepare as shard_images
from ..shards.options import ReadOptions
from ..shards.readers import fields, intake, tables
from ..shards.readers import formats as readers
from ..shards.records import Location, Rejection, ShardError
from ..shards.storage import store, tars
from .captioned import CaptionedImage, EvalDataError, later_dates
from .small_files import FileProblem, parse_json, require_regular
from .streams import StreamError, open_shard, read_location, retrying, version_of


def read_shards(shards: str | Sequence[str]) -> list[CaptionedImage]:
    """Images of WebDataset shards in the image or pair layout, in their order; pairs of one image put together again.

    An image is known by `image_id` of its JSON and by its bytes: sets that were made apart may use the same names.
    Shards of other makers have no `image_id`, there equal bytes alone are one image.

    Args:
        shards: URLs, with braces and `::` as open_clip has them; read as the trainer reads them, with retries and
            through the cache; what `pipe:` commands put out is copied to a temporary file.
    Raises:
        EvalDataError: a shard cannot be read, a sample lacks its image or text, or has more or fewer dates than others.
    """
    urls = expand(shards) if isinstance(shards, str) else list(shards)
    found: dict[tuple[str, str], CaptionedImage] = {}
    first: CaptionedImage | None = None
    for url in urls:
        try:
            for image in _read_shard(url):
                identity = (image.image_id, image.content)
                known = found.get(identity)
                first = first or image
                if len(image.locations) != len(first.locations):
                    counts = f"{len(image.locations)} dates, {first.image_id} has {len(first.locations)}"
                    raise EvalDataError(f"{url}: {image.image_id} has {counts}; read sets of one number of dates.")
                captions = (*known.captions, *image.captions) if known else image.captions
                found[identity] = replace(known or image, captions=captions)
        except StreamError as error:
            raise EvalDataError(str(error)) from error
        except (OSError, tarfile.TarError, UnicodeDecodeError) as error:
            raise EvalDataError(f"{url}: not a readable shard ({type(error).__name__}: {error}).") from error
    return list(found.values())


def expand(shards: str) -> list[str]:
    """URLs of a pattern such as `a-{000..003}.tar::b.tar`."""
    return [url for pattern in shards.split("::") for url in braceexpand(pattern)]


_kept: list[IO[bytes]] = []


@contextmanager
def _seekable(url: str) -> Iterator[tuple[IO[bytes], str]]:
    """A shard to seek in, and where its images can be read later.

    A stream is copied to a temporary file for as long as this lasts; what a command puts out, until the process ends,
    because a command cannot be asked for one image later.
    """
    with open_shard(url) as stream:
        if isinstance(stream, io.BufferedReader) and stream.seekable():
            yield stream, url
            return
        copy = tempfile.NamedTemporaryFile(suffix=".tar")  # noqa: SIM115 - may outlast this function
        try:
            shutil.copyfileobj(stream, copy)
            copy.seek(0)  # which also flushes
            yield copy, copy.name if url.startswith("pipe:") else url
        finally:
            if url.startswith("pipe:"):
                _kept.append(copy)
            else:
                copy.close()


def _read_shard(url: str) -> Iterator[CaptionedImage]:
    with _seekable(url) as (file, place_url):
        for key, group in list(tars.samples(file)):
            members = {member.extension: member for member in group}
            images = tars.images_of(members)
            if not images or "txt" not in members:
                raise EvalDataError(
                    f"{url}: sample {key} has {', '.join(sorted(members))}; it needs KEY.txt and one of "
                    f"{', '.join('KEY.' + name for name in tars.IMAGE_MEMBERS)}, or open_clip would drop it in "
                    "silence. Build the shards with `msa-openclip shards`."
                )
            text = tars.read_member(file, members["txt"]).decode()
            if (gap := tars.missing_date(members)) is not None:
                raise EvalDataError(
                    f"{url}: sample {key} has {', '.join(sorted(members))}; the image of date {gap} is missing. "
                    "Build the shards again, or leave the sample out."
                )
            content = _digest(b"".join(tars.read_member(file, image) for image in images))
            metadata = _metadata(tars.read_member(file, members["json"]) if "json" in members else b"{}", url, key)
            if len(metadata.get("dates") or images) != len(images):
                raise EvalDataError(f"{url}: sample {key}: {len(images)} images, its JSON says {metadata['dates']}.")
            image_id = metadata.get("image_id") or f"sha256:{content}"
            captions = tuple(filter(None, map(fields.usable_caption, text.splitlines())))
            location, *later = (Location(place_url, image.offset, image.size) for image in images)
            known: dict[str, Any] = {name: metadata[name] for name in ("geo", "meta", "dates") if name in metadata}
            known |= later_dates(later)
            yield CaptionedImage(image_id, location, captions, metadata.get("class"), known, content)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _metadata(data: bytes, url: str, key: str) -> dict[str, Any]:
    """The JSON of a sample, whoever made it: what is used of it has the types that everything after this expects.

    Raises:
        EvalDataError: it is no object, or a field is of another type; the message names shard, sample and field.
    """
    where = f"{url}: sample {key}: {key.rpartition('/')[2]}.json"
    try:
        found = parse_json(data, where)
    except FileProblem as error:
        kind = type(error.__cause__).__name__
        raise EvalDataError(f"{url}: not a readable shard ({kind}: {error}).") from error
    if not isinstance(found, dict):
        raise EvalDataError(f"{where}: expected an object, got {type(found).__name__}.")
    if type(found.get("image_id")) is int:  # as other makers number their images
        found["image_id"] = str(found["image_id"])
    fields: tuple[tuple[str, type, str], ...] = (
        ("image_id", str, "a text"),
        ("class", str, "a text"),
        ("geo", dict, "an object"),
        ("meta", dict, "an object"),
        ("dates", list, "a list"),
    )
    for field, type_, expected in fields:
        if found.get(field) is None:
            found.pop(field, None)
        elif not isinstance(found[field], type_):
            raise EvalDataError(f"{where}: {field} is {reprlib.repr(found[field])}, expected {expected}.")
    bounds = found.get("geo", {}).get("bounds")
    if bounds is not None and not are_bounds(bounds):
        raise EvalDataError(f"{where}: geo.bounds is {reprlib.repr(bounds)}, expected west, south, east, north.")
    return found


def are_bounds(value: Any) -> bool:
    """Whether a value is four finite numbers."""
    if not (isinstance(value, list) and len(value) == 4):
        return False
    return all(type(number) in (int, float) and abs(number) < 1e15 for number in value)  # NaN compares as false


def content_of(location: Location) -> str:
    """What tells an image from others of its name and from later versions of itself: a hash of its bytes.

    Of whole remote files it is what their store says of them, so that nothing is read; empty where a local file cannot
    be read.

    Raises:
        StreamError: a store cannot be reached.
    """
    if not store.is_local(location.url):
        return _digest(version_of(location.url).encode() if location.offset is None else read_location(location))
    try:
        require_regular(store.local_path(location.url))
        return _digest(read_location(location))
    except (OSError, ValueError):
        return ""


def read_captions(
    captions: str, images: str | None = None, *, split: str | None = None, kind: str = "auto"
) -> list[CaptionedImage]:
    """Images of a caption file in any format that the shard builder reads (Karpathy JSON, precomp, ...).

    Args:
        captions: the caption file or folder.
        images: folder below which the images are found by name, with any image extension.
        split: keep this split only.
        kind: the format, where it cannot be told from the file.
    Raises:
        EvalDataError: an image is missing, or nothing is left.
    """
    options = ReadOptions(kind=kind)
    entries = (
        entry
        for entry in readers.read(captions, options)
        if isinstance(entry, Rejection) or split in (None, options.renames.get(entry.split or "", entry.split))
    )
    found, refused = [], []
    for record in intake.to_records(entries, images, options, seed=0):
        if isinstance(record, Rejection):
            refused += [record] if record.reason not in ("blank caption", "no captions") else []
        else:
            known = later_dates(record.later)
            found.append(CaptionedImage(record.image_id, record.image, record.captions, record.label, known))
    if refused:
        first = refused[0]
        raise EvalDataError(f"{captions}: {len(refused)} unusable, first {first.file}: {first.reason}, {first.detail}.")
    if not found:
        raise EvalDataError(f"{captions}: no image" + (f" in split {split!r}." if split else "."))
    return found


def read_csv(path: str, image_key: str, caption_key: str, separator: str = "\t") -> list[CaptionedImage]:
    """Images of an open_clip CSV, a line per caption; lines with the same image path belong together.

    Cells are read as the shard builder reads them: a JSON list is several captions, and what stands for a missing one
    ("nan", "None") is none.

    Raises:
        EvalDataError: a column is missing or there twice, a row lacks a field or its image, a stray quote takes in
            other rows, or a line is not UTF-8.
    """
    try:
        columns = tables.columns_of(path, separator)
        for name in (image_key, caption_key):
            if name not in columns:
                raise EvalDataError(f"{path}: no column {name!r}; it has {', '.join(columns)}.")
        found = []
        for name, rows in tables.rows_by_image(path, image_key, separator):
            if not name:
                raise EvalDataError(f"{path}: a row names no image in column {image_key!r}.")
            texts = [text for row in rows for text in fields.captions(row[caption_key], f"{name}: {caption_key}")]
            found.append(CaptionedImage(name, Location(name), tuple(filter(None, map(fields.usable_caption, texts)))))
        return found
    except (ShardError, OSError) as error:
        raise EvalDataError(str(error)) from error
    except TypeError as error:  # of `fields`
        raise EvalDataError(f"{path}: {error}.") from error


def read_folder(folder: str) -> list[CaptionedImage]:
    """All images below a folder, also GeoTIFFs, with their path as id and without captions.

        images = read_folder("tiles")

    Raises:
        EvalDataError: there is none.
    """
    names = [name for name in _names_below(folder) if name.lower().endswith(shard_images.EXTENSIONS)]
    if not names:
        raise EvalDataError(f"{folder}: no images; known are {', '.join(shard_images.EXTENSIONS)}.")
    return [CaptionedImage(name, Location(store.join(folder, name)), ()) for name in names]


def read_class_folder(folder: str) -> list[CaptionedImage]:
    """Images of FOLDER/CLASS/..., labelled by the first part of their path; without captions.

    Raises:
        EvalDataError: no image lies in a sub-folder.
    """
    names = [n for n in _names_below(folder) if "/" in n and n.lower().endswith(shard_images.EXTENSIONS)]
    if not names:
        raise EvalDataError(f"{folder}: no images below class folders; expected {folder}/CLASS/IMAGE.jpg.")
    return [CaptionedImage(name, Location(store.join(folder, name)), (), name.split("/")[0]) for name in names]


def _names_below(folder: str) -> list[str]:
    try:
        return retrying(folder, lambda: store.listing(folder))
    except StreamError as error:
        raise EvalDataError(str(error)) from error
