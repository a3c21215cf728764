"""From entries to records: find the image, settle the split, clean the captions; what cannot be used says why."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import PurePosixPath

from ..imagery.prepare import EXTENSIONS
from ..options import ReadOptions
from ..records import SPLITS, Entry, Location, Record, Rejection, clean_caption, sample_key
from ..storage import store
from . import fields


class ImageFolder:
    """Finds images by the names that caption files use: exact, elsewhere below the root, or with another extension.

    Names that lead out of the root, like ../a.jpg, /a.jpg or http://host/a.jpg, are found only where `outside` is set.
    """

    def __init__(self, root: str, *, outside: bool = False) -> None:
        self.root = root
        self._outside = outside
        self._index: dict[str, list[str]] | None = None

    def find(self, name: str) -> str | None:
        """The URL of the image, or None; a name that fits several files is no find.

        Raises:
            LookupError: several files below the root fit the name equally well.
            PermissionError: it leads out of the root.
        """
        direct = store.join(self.root, name)
        if not self._outside and not store.is_inside(direct, self.root):
            raise PermissionError(f"lies outside {self.root or 'the working directory'}")
        if not store.is_local(direct):
            if direct.startswith(("http://", "https://")) or "://" in name:
                return direct  # such stores cannot be listed; a missing image shows when it is read
        elif store.exists(direct):
            return direct
        if self._index is None:
            self._index = self._make_index()
        path = PurePosixPath(name)
        for wanted in (name, path.name, _stem(name), path.stem):
            found = self._index.get(wanted, [])
            if len(found) > 1:
                raise LookupError(f"{name} fits {len(found)} files, e.g. {found[0]} and {found[1]}")
            if found:
                return store.join(self.root, found[0])
        return None

    def _make_index(self) -> dict[str, list[str]]:
        index: dict[str, list[str]] = {}
        for relative in store.listing(self.root):
            if relative.lower().endswith(EXTENSIONS):
                path = PurePosixPath(relative)
                for name in {relative, path.name, _stem(relative), path.stem}:
                    index.setdefault(name, []).append(relative)
        return index


def to_records(
    entries: Iterable[Entry | Rejection],
    images: str | None,
    options: ReadOptions,
    seed: int,
    *,
    outside: bool = False,
) -> Iterator[Record | Rejection]:
    """Clean entries one by one, in order; what cannot be used comes out as a rejection instead.

    Args:
        outside: let entries name images outside the folder `images`.
    """
    folder = ImageFolder(images or "", outside=outside)
    seen: dict[bytes, str] = {}
    first: tuple[str, int] | None = None  # with the number of dates that all samples of a set have
    for entry in entries:
        if isinstance(entry, Rejection):
            yield entry
            continue
        name = entry.image if isinstance(entry.image, str) else entry.source or entry.image_id or entry.image.url
        if not name:
            yield Rejection("", "no image", f"no name stands beside the captions, e.g. {entry.captions[:1]}")
            continue
        if not _encodable(name, entry):
            yield Rejection(name, "not UTF-8", "its name, class or JSON is no valid Unicode; rename it")
            continue
        split = _split(entry, options, seed)
        if split not in SPLITS:
            yield Rejection(name, "unknown split", f"{split!r}; rename it with --split-map {split}=train")
            continue
        identity = entry.image_id or _stem(name)
        digest = blake2b(sample_key(identity).encode(), digest_size=8).digest()
        if digest in seen:
            yield Rejection(name, "duplicate key", f"the key of {identity!r} in {split} came before in {seen[digest]}")
            continue
        captions, problems = _clean(entry.captions, name)
        yield from problems
        if not captions:
            yield Rejection(name, "no captions", "every caption is blank" if entry.captions else "none given")
            continue
        places = _locate_all(entry, folder)
        if isinstance(places, Rejection):
            yield places
            continue
        first = first or (name, len(places))
        if len(places) != first[1]:
            yield Rejection(name, "number of dates", f"{len(places)} where {first[0]}, the first, has {first[1]}")
            continue
        seen[digest] = split
        image, *later = places
        yield Record(identity, image, name, captions, split, entry.label, entry.meta, tuple(later))


def _encodable(name: str, entry: Entry) -> bool:
    try:
        text = json.dumps(entry.meta, ensure_ascii=False) if entry.meta else ""
    except RecursionError:
        return False
    return fields.encodable(name, entry.image_id, entry.label, entry.split, text)


def _clean(captions: tuple[str, ...], name: str) -> tuple[tuple[str, ...], list[Rejection]]:
    """The captions that can be used, and a rejection for each other one."""
    kept, problems = [], []
    for index, caption in enumerate(captions):
        text, which = clean_caption(caption), f"caption {index} of {len(captions)}"
        if fields.usable_caption(text):
            kept.append(text)
        elif not text:
            problems.append(Rejection(name, "blank caption", which))
        elif text in fields.MISSING:
            problems.append(Rejection(name, "blank caption", f"{which} is {text!r}, which stands for a missing one"))
        else:
            problems.append(Rejection(name, "caption not Unicode", f"{which} has half a character: {text!a:.80}"))
    return tuple(kept), problems


def _stem(name: str) -> str:
    """The name without its extension, if that is an image's (a dot in `scene.v2` is not one)."""
    path = PurePosixPath(name)
    return str(path.with_suffix("")) if path.suffix.lower() in EXTENSIONS else name


def _split(entry: Entry, options: ReadOptions, seed: int) -> str:
    given = entry.split or options.split or "train"
    split = options.renames.get(given, given)
    if split != "train":
        return split
    # The share is drawn by the image's name, so that no image moves when others are added.
    identity = entry.image_id or str(entry.image)
    draw = int.from_bytes(blake2b(f"holdout {seed} {identity}".encode(), digest_size=8).digest(), "big") / 2.0**64
    for name, share in options.shares.items():
        if draw < share:
            return name
        draw -= share
    return split


def _locate_all(entry: Entry, folder: ImageFolder) -> list[Location] | Rejection:
    """Where the images of all dates lie, or why one of them cannot be used."""
    places: list[Location] = []
    for image in entry.images:
        place = _locate(image, folder)
        if isinstance(place, Rejection):
            return place
        if place in places:  # names are also looked up without their folders
            return Rejection(str(image), "missing image", f"only {place.url}, which is the image of another date")
        places.append(place)
    return places


def _locate(image: str | Location, folder: ImageFolder) -> Location | Rejection:
    if isinstance(image, Location):
        return image
    try:
        url = folder.find(image)
    except LookupError as error:
        return Rejection(image, "ambiguous image", str(error))
    except PermissionError as error:
        return Rejection(image, "image outside", f"{error}; give --images a folder that holds it, or --outside")
    if url is None:
        where = folder.root or "the working directory"
        return Rejection(image, "missing image", f"no such file below {where}, with any image extension")
    return Location(url)
