"""Images with all their captions, from shards of either layout, caption files or CSV: what an evaluation is made of.

Only places are kept, never pixels: a set of any size is a list of (file, offset, size), and each worker or rank reads
the bytes of its own share.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from braceexpand import braceexpand
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .metrics import Truth
from .shards import images as shard_images
from .shards import intake, readers, sources, store, tars
from .shards.options import ImageOptions, ReadOptions
from .shards.records import Location, Rejection, ShardError, clean_caption

Preprocess = Callable[[Image.Image], Tensor]
IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp")
"""Shard members that open_clip takes for the image."""
_EVAL_IMAGES = ImageOptions(check="decode")


class EvalDataError(ValueError):
    """The data to evaluate on cannot be used; the message names file, sample and remedy."""


@dataclass(frozen=True)
class CaptionedImage:
    """One image of an evaluation set and all that is said about it."""

    image_id: str
    place: Location
    captions: tuple[str, ...]
    """May be empty: the image then only distracts."""
    label: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """What else shards know of it: `geo` (crs, bounds, gsd_m), `meta`."""


class EvalSet:
    """Images, their distinct captions, and which caption belongs to which image.

    Raises:
        EvalDataError: there is no image, or no caption.
    """

    def __init__(self, images: Sequence[CaptionedImage], source: str) -> None:
        self.images, self.source = tuple(images), source
        owner = [index for index, image in enumerate(self.images) for _ in image.captions]
        said = [caption for image in self.images for caption in image.captions]
        if not said:
            raise EvalDataError(f"{source}: {len(self.images)} images with no caption at all; nothing to evaluate.")
        columns: dict[str, int] = {}
        column = torch.tensor([columns.setdefault(caption, len(columns)) for caption in said])
        order = column.argsort(stable=True)
        self.texts = tuple(columns)
        """Distinct captions; entry c is score column c."""
        self.per_caption = Truth.per_caption(torch.tensor(owner)[order], column=column[order], images=len(self.images))
        self.merged = Truth.merged(torch.tensor(owner)[order], column=column[order], images=len(self.images))

    @property
    def captions(self) -> int:
        """Captions, copies included."""
        return len(self.per_caption.query_column)

    @property
    def classes(self) -> tuple[tuple[str, ...], Tensor]:
        """Names of the classes and the class of every image (I,), -1 where it has none."""
        names = tuple(sorted({image.label for image in self.images if image.label is not None}))
        number = {name: index for index, name in enumerate(names)}
        return names, torch.tensor([-1 if i.label is None else number[i.label] for i in self.images])


def read_shards(shards: str | Sequence[str]) -> list[CaptionedImage]:
    """Images of WebDataset shards in the image or pair layout, in their order; pairs of one image put together again.

    An image is known by `image_id` of its JSON; shards of other makers have none, there equal bytes are one image.

    Args:
        shards: URLs, with braces and `::` as open_clip has them; `pipe:` commands are copied to a temporary file.
    Raises:
        EvalDataError: a shard cannot be read, or a sample lacks its image or text.
    """
    urls = expand(shards) if isinstance(shards, str) else list(shards)
    found: dict[str, CaptionedImage] = {}
    for url in urls:
        try:
            for image in _read_shard(_seekable(url)):
                known = found.get(image.image_id)
                captions = (*known.captions, *image.captions) if known else image.captions
                found[image.image_id] = replace(known or image, captions=captions)
        except (OSError, tarfile.TarError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise EvalDataError(f"{url}: not a readable shard ({type(error).__name__}: {error}).") from error
    return list(found.values())


def expand(shards: str) -> list[str]:
    """URLs of a pattern such as `a-{000..003}.tar::b.tar`."""
    return [url for pattern in shards.split("::") for url in braceexpand(pattern)]


_copies: list[Any] = []


def _seekable(url: str) -> str:
    """The URL itself, or where the output of a `pipe:` command has been put, kept until the process ends."""
    if not url.startswith("pipe:"):
        return url
    from webdataset import gopen

    copy = tempfile.NamedTemporaryFile(suffix=".tar")  # noqa: SIM115 - read again and again, long after this function
    with gopen(url, "rb") as stream:
        shutil.copyfileobj(stream, copy)
    copy.flush()
    _copies.append(copy)
    return copy.name


def _read_shard(url: str) -> Iterator[CaptionedImage]:
    with store.open_read(url) as file:
        samples = [(key, {member.extension: member for member in members}) for key, members in tars.samples(file)]
        for key, members in samples:
            image = next((members[name] for name in IMAGE_MEMBERS if name in members), None)
            if image is None or "txt" not in members:
                raise EvalDataError(
                    f"{url}: sample {key} has {', '.join(sorted(members))}; it needs KEY.txt and one of "
                    f"{', '.join('KEY.' + name for name in IMAGE_MEMBERS)}, or open_clip would drop it in silence. "
                    "Build the shards with `msa-openclip shards`."
                )
            text = _bytes(file, members["txt"]).decode()
            about = json.loads(_bytes(file, members["json"])) if "json" in members else {}
            image_id = about.get("image_id") or "sha256:" + hashlib.sha256(_bytes(file, image)).hexdigest()
            captions = tuple(filter(None, map(clean_caption, text.splitlines())))
            place = Location(url, image.offset, image.size)
            known = {key: about[key] for key in ("geo", "meta") if key in about}
            yield CaptionedImage(image_id, place, captions, about.get("class"), known)


def _bytes(file: io.IOBase | Any, member: tars.Member) -> bytes:
    file.seek(member.offset)
    data: bytes = file.read(member.size)
    return data


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
    names = [name for name in store.listing(folder) if name.lower().endswith(shard_images.EXTENSIONS)]
    if not names:
        raise EvalDataError(f"{folder}: no images; known are {', '.join(shard_images.EXTENSIONS)}.")
    return [CaptionedImage(name, Location(store.join(folder, name)), ()) for name in names]


def read_class_folder(folder: str) -> list[CaptionedImage]:
    """Images of FOLDER/CLASS/..., labelled by the first part of their path; without captions.

    Raises:
        EvalDataError: no image lies in a sub-folder.
    """
    names = [n for n in store.listing(folder) if "/" in n and n.lower().endswith(shard_images.EXTENSIONS)]
    if not names:
        raise EvalDataError(f"{folder}: no images below class folders; expected {folder}/CLASS/IMAGE.jpg.")
    return [CaptionedImage(name, Location(store.join(folder, name)), (), name.split("/")[0]) for name in names]


def load_image(image: CaptionedImage) -> Image.Image:
    """Decode an image as shards would hold it: RGB, upright, 8 bit; from TIFF and others, too.

    Raises:
        EvalDataError: it cannot be decoded.
    """
    try:
        ready = shard_images.prepare(sources.read_location(image.place), _EVAL_IMAGES)
        return Image.open(io.BytesIO(ready.data)).convert("RGB")
    except (OSError, ShardError) as error:
        raise EvalDataError(f"{image.place.url}: image {image.image_id} cannot be read: {error}.") from error


class _Pixels(Dataset[Tensor]):
    def __init__(self, images: Sequence[CaptionedImage], preprocess: Preprocess) -> None:
        self.images, self.preprocess = images, preprocess

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.preprocess(load_image(self.images[index]))


def batches(
    images: Sequence[CaptionedImage], preprocess: Preprocess, chosen: Iterable[Sequence[int]], workers: int = 0
) -> Iterator[Tensor]:
    """Preprocessed pixels (B, 3, h, w) of each batch of indices; draws nothing from the global random generator."""
    loader = DataLoader(
        _Pixels(images, preprocess),
        batch_sampler=[list(batch) for batch in chosen],
        num_workers=workers,
        generator=torch.Generator(),
    )
    yield from loader
