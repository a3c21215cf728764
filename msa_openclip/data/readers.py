"""Captioned images from shards of either layout, caption files, CSV and folders, wherever they lie."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import IO

from braceexpand import braceexpand

from ..shards.imagery import prepare as shard_images
from ..shards.options import ReadOptions
from ..shards.readers import formats as readers
from ..shards.readers import intake
from ..shards.records import Location, Rejection, clean_caption
from ..shards.storage import store, tars
from .captioned import CaptionedImage, EvalDataError
from .streams import StreamError, open_shard, retrying


def read_shards(shards: str | Sequence[str]) -> list[CaptionedImage]:
    """Images of WebDataset shards in the image or pair layout, in their order; pairs of one image put together again.

    An image is known by `image_id` of its JSON; shards of other makers have none, there equal bytes are one image.

    Args:
        shards: URLs, with braces and `::` as open_clip has them; read as the trainer reads them, with retries and
            through the cache; what `pipe:` commands put out is copied to a temporary file.
    Raises:
        EvalDataError: a shard cannot be read, or a sample lacks its image or text.
    """
    urls = expand(shards) if isinstance(shards, str) else list(shards)
    found: dict[str, CaptionedImage] = {}
    for url in urls:
        try:
            for image in _read_shard(url):
                known = found.get(image.image_id)
                captions = (*known.captions, *image.captions) if known else image.captions
                found[image.image_id] = replace(known or image, captions=captions)
        except StreamError as error:
            raise EvalDataError(str(error)) from error
        except (OSError, tarfile.TarError, json.JSONDecodeError, UnicodeDecodeError) as error:
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
    because nobody could ask the command for one image.
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
            image = tars.image_of(members)
            if image is None or "txt" not in members:
                raise EvalDataError(
                    f"{url}: sample {key} has {', '.join(sorted(members))}; it needs KEY.txt and one of "
                    f"{', '.join('KEY.' + name for name in tars.IMAGE_MEMBERS)}, or open_clip would drop it in "
                    "silence. Build the shards with `msa-openclip shards`."
                )
            text = tars.read_member(file, members["txt"]).decode()
            metadata = json.loads(tars.read_member(file, members["json"])) if "json" in members else {}
            image_id = metadata.get("image_id") or "sha256:" + hashlib.sha256(tars.read_member(file, image)).hexdigest()
            captions = tuple(filter(None, map(clean_caption, text.splitlines())))
            location = Location(place_url, image.offset, image.size)
            known = {key: metadata[key] for key in ("geo", "meta") if key in metadata}
            yield CaptionedImage(image_id, location, captions, metadata.get("class"), known)


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
            found.append(CaptionedImage(record.image_id, record.image, record.captions, record.label))
    if refused:
        first = refused[0]
        raise EvalDataError(f"{captions}: {len(refused)} unusable, first {first.file}: {first.reason}, {first.detail}.")
    if not found:
        raise EvalDataError(f"{captions}: no image" + (f" in split {split!r}." if split else "."))
    return found


def read_csv(path: str, image_key: str, caption_key: str, separator: str = "\t") -> list[CaptionedImage]:
    """Images of an open_clip CSV, a line per caption; lines with the same image path belong together.

    Raises:
        EvalDataError: a column is missing.
    """
    found: dict[str, list[str]] = {}
    with open(path, newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file, delimiter=separator)
        missing = {image_key, caption_key} - set(rows.fieldnames or ())
        if missing:
            raise EvalDataError(f"{path}: no column {sorted(missing)[0]!r}; it has {', '.join(rows.fieldnames or ())}.")
        for row in rows:
            found.setdefault(row[image_key], []).append(clean_caption(row[caption_key]))
    return [CaptionedImage(name, Location(name), tuple(filter(None, texts))) for name, texts in found.items()]


def read_folder(folder: str) -> list[CaptionedImage]:
    """All images below a folder, also GeoTIFFs, known by their path; without captions.

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
