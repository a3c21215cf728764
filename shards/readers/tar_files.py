"""Reader of existing WebDataset tars: our own, img2dataset's, RS5M's (img_content, caption), anybody's."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from typing import IO, Any

import braceexpand

from .. import manifest
from ..imagery.prepare import EXTENSIONS
from ..options import ReadOptions
from ..records import SPLITS, Entry, Location, Rejection, ShardError
from ..storage import json_text, store
from ..storage.tars import Member, images_of, missing_date, read_member, samples
from . import fields

_IMAGES = {*(extension[1:] for extension in EXTENSIONS), "img_content", "image", "img"}
_TEXTS = ("txt", "caption", "captions", "text")
_CAPTION_KEYS = ("captions", "caption", "text", "title")
# What `samples.members` writes itself; all else in the JSON of one of our samples travels on as it is.
_OWN = re.compile(r"image_id|source|split|class|captions|caption_\w+|width|height|sha256")


def read_tar(pattern: str, options: ReadOptions) -> Iterator[Entry | Rejection]:
    """Samples of tars; those of a `pair` layout are put together again by image id.

    Where several sources are joined by ::, the name of each goes before its image ids, which may be alike otherwise.
    """
    pairs: dict[str, dict[int, Entry]] = {}
    sources = pattern.split("::")
    prefixes = _prefixes(sources) if len(sources) > 1 else [""]
    for prefix, url in (
        (prefix, url) for prefix, source in zip(prefixes, sources, strict=True) for url in expand(source)
    ):
        with store.open_read(url) as file:
            try:
                for key, members in samples(file):
                    entry, index = _entry(url, file, key, members, options, prefix)
                    if isinstance(entry, Rejection) or index is None:
                        yield entry
                    elif index in (group := pairs.setdefault(entry.image_id or key, {})):
                        yield Rejection(f"{url}:{key}", "duplicate key", f"caption {index} of its image came before")
                    else:
                        group[index] = entry
            except tarfile.TarError as error:
                yield Rejection(url, "damaged tar", f"{error}; samples behind the damage are lost")
    for group in pairs.values():
        captions = tuple(text for index in sorted(group) for text in group[index].captions)
        first = group[min(group)]
        yield replace(first, captions=captions)


def places(pattern: str) -> Iterator[str]:
    """The folders and tars that a pattern names, and the tars in those folders."""
    for source in pattern.split("::"):
        yield from braceexpand.braceexpand(source)
        yield from expand(source)


def expand(pattern: str) -> list[str]:
    """The tars of a brace pattern, of a folder, or the one that is named.

    Raises:
        ShardError: there is none.
    """
    urls: list[str] = []
    for url in braceexpand.braceexpand(pattern):
        if store.is_folder(url):
            _require_finished(url)
            urls += [store.join(url, name) for name in store.listing(url) if name.endswith(".tar")]
        else:
            urls.append(url)
    missing = [url for url in urls if not store.exists(url)]
    if missing or not urls:
        raise ShardError(f"{pattern}: {f'{missing[0]} does not exist' if missing else 'holds no .tar'}.")
    return urls


def _require_finished(folder: str) -> None:
    state, finished = (store.join(folder, name) for name in (f"{manifest.STATE}/state.json", "manifest.json"))
    if store.exists(state) and not store.exists(finished):
        raise ShardError(f"{folder}: its build is unfinished. Let the command that began it end it.")


def _entry(
    url: str, file: IO[bytes], key: str, members: list[Member], options: ReadOptions, prefix: str
) -> tuple[Entry | Rejection, int | None]:
    """A sample, and which caption of its image it holds in a `pair` layout of ours."""
    by_extension = {member.extension: member for member in members}
    wanted = {options.image_member} if options.image_member else _IMAGES
    image = next((member for member in members if member.extension in wanted), None)
    images = [image] if image else [] if options.image_member else images_of(by_extension)
    found, gap = ", ".join(sorted(by_extension)), missing_date(by_extension)
    if gap is not None and not options.image_member:
        return Rejection(f"{url}:{key}", "missing image", f"of date {gap}; members are {found}"), None
    if not images:
        return Rejection(f"{url}:{key}", "no image", f"members are {found}; name the image: --image-member"), None
    try:
        texts = [_text(file, by_extension[name]) for name in options.caption_columns or _TEXTS if name in by_extension]
        metadata = read_metadata(file, by_extension.get("json"))
        ours = "image_id" in metadata and "sha256" in metadata
        captions = _captions(texts[:1], metadata, options.caption_columns, ours=ours)
        pair = ours and "caption_index" in metadata
        index = fields.typed(metadata["caption_index"], int, "caption_index") if pair else None
        name = fields.label(metadata.get("image_id"), "image_id") or key
        split = fields.label(metadata.get("split"), "split") or _split_of(url)
        label = fields.label(metadata.get("class"), "class")
        source = fields.label(metadata.get("source"), "source") or f"{store.base_name(url)}:{images[0].name}"
    except (KeyError, TypeError, ShardError, UnicodeDecodeError) as error:
        return Rejection(f"{url}:{key}", "damaged sample", str(error)), None
    meta = {name: value for name, value in metadata.items() if not _OWN.fullmatch(name)} if ours else {}
    place, *later = (Location(url, offset=member.offset, size=member.size) for member in images)
    entry = Entry(place, tuple(captions), split, label, prefix + name, meta, source, tuple(later))
    return entry, index


def read_metadata(file: IO[bytes], member: Member | None) -> dict[str, Any]:
    """The JSON of a sample; empty where it has none.

    Raises:
        ShardError: it is no JSON object.
    """
    if member is None:
        return {}
    content = json_text.parse(read_member(file, member), member.name)
    if not isinstance(content, dict):
        raise ShardError(f"{member.name}: not a JSON object.")
    return content


def _text(file: IO[bytes], member: Member) -> str:
    try:
        return read_member(file, member).decode()
    except UnicodeDecodeError as error:
        raise ShardError(f"{member.name}: not UTF-8 ({error}).") from error


def _captions(texts: list[str], metadata: dict[str, Any], asked: tuple[str, ...], *, ours: bool) -> list[str]:
    """The captions of a sample, of its text if it has one, else of its JSON.

    Those of our own samples are taken as they stand in the list of the JSON: a caption in quotes or brackets is no
    JSON text, as it may be in tars of others.
    """
    if ours and not asked and isinstance(metadata.get("captions"), list):
        return fields.captions(metadata["captions"], "captions")
    captions = [caption for text in texts for caption in (_split(text) if ours else _lines(text))]
    for name in asked or _CAPTION_KEYS:
        captions = captions or fields.captions(metadata.get(name), name)
    return captions


def _lines(text: str) -> list[str]:
    """Captions, a line each, or a JSON string or list of strings."""
    if text[:1] == '"':
        try:
            return fields.captions(json_text.parse(text, ""), "captions")
        except json_text.JsonError:
            return _split(text)
    if text[:1] == "[":
        listed = fields.captions(text.strip(), "captions")
        if listed != [text.strip()]:  # else it is a caption that begins with a bracket
            return listed
    return _split(text)


def _split(text: str) -> list[str]:
    return text.rstrip("\n").split("\n")


def _prefixes(sources: list[str]) -> list[str]:
    """`ucm/` for the folder data/ucm and for data/ucm/train-{000..007}.tar: the folder's name tells data sets apart.

    Of several folders of one name the second is `ucm-2/`, and so on; sources in one folder are one data set.
    """
    found, folders = list[str](), dict[str, str]()
    for source in sources:
        folder = store.parent(source) if source.endswith(".tar") else source
        name = store.base_name(folder)
        spellings = (name, *(f"{name}-{number}" for number in range(2, len(sources) + 1)))
        prefix = next(each for each in spellings if each not in folders or store.same(folders[each], folder))
        folders[prefix] = folder
        found.append(f"{prefix}/")
    return found


def _split_of(url: str) -> str | None:
    words = re.split(r"[^a-z]+", store.base_name(url).lower())
    return next((split for split in SPLITS if split in words), None)
