"""Reader of existing WebDataset tars: our own, img2dataset's, RS5M's (img_content, caption), anybody's."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from typing import IO, Any

import braceexpand

from ..imagery.prepare import EXTENSIONS
from ..options import ReadOptions
from ..records import SPLITS, Entry, Location, Rejection, ShardError
from ..storage import store
from ..storage.tars import Member, read_member, samples

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
    for prefix, url in ((f"{_name_of(source)}/", url) for source in sources for url in expand(source)):
        with store.open_read(url) as file:
            try:
                for key, members in samples(file):
                    entry, index = _entry(url, file, key, members, options, prefix if len(sources) > 1 else "")
                    if isinstance(entry, Entry) and index is not None:
                        pairs.setdefault(entry.image_id or key, {})[index] = entry
                    else:
                        yield entry
            except tarfile.TarError as error:
                yield Rejection(url, "damaged tar", f"{error}; samples behind the damage are lost")
    for group in pairs.values():
        captions = tuple(group[index].captions[0] for index in sorted(group))
        first = group[min(group)]
        yield Entry(first.image, captions, first.split, first.label, first.image_id, first.meta, first.source)


def expand(pattern: str) -> list[str]:
    """The tars of a brace pattern, of a folder, or the one that is named.

    Raises:
        ShardError: there is none.
    """
    urls: list[str] = []
    for url in braceexpand.braceexpand(pattern):
        if store.is_folder(url):
            urls += [store.join(url, name) for name in store.listing(url) if name.endswith(".tar")]
        else:
            urls.append(url)
    missing = [url for url in urls if not store.exists(url)]
    if missing or not urls:
        raise ShardError(f"{pattern}: {f'{missing[0]} does not exist' if missing else 'holds no .tar'}.")
    return urls


def _entry(
    url: str, file: IO[bytes], key: str, members: list[Member], options: ReadOptions, prefix: str
) -> tuple[Entry | Rejection, int | None]:
    by_extension = {member.extension: member for member in members}
    wanted = {options.image_member} if options.image_member else _IMAGES
    image = next((member for member in members if member.extension in wanted), None)
    if image is None:
        found = ", ".join(sorted(by_extension))
        return Rejection(f"{url}:{key}", "no image", f"members are {found}; name the image: --image-member"), None
    metadata = _json(file, by_extension["json"]) if "json" in by_extension else {}
    captions: list[str] = []
    for name in options.caption_columns or _TEXTS:
        if name in by_extension and not captions:
            captions = _captions(read_member(file, by_extension[name]).decode("utf-8", "replace"))
    for name in options.caption_columns or _CAPTION_KEYS:
        if name in metadata and not captions:
            value = metadata[name]
            captions = [value] if isinstance(value, str) else list(value)
    ours = "image_id" in metadata and "sha256" in metadata
    meta = {name: value for name, value in metadata.items() if not _OWN.fullmatch(name)} if ours else {}
    return Entry(
        Location(url, offset=image.offset, size=image.size),
        tuple(captions),
        split=metadata.get("split") or _split_of(url),
        label=metadata.get("class"),
        image_id=prefix + metadata.get("image_id", key),
        meta=meta,
        source=metadata.get("source", f"{store.base_name(url)}:{image.name}"),
    ), metadata.get("caption_index") if ours else None


def _captions(text: str) -> list[str]:
    """Lines, or a JSON string or list of strings."""
    if text[:1] in '["':
        try:
            value = json.loads(text)
        except ValueError:
            return text.split("\n")
        return [value] if isinstance(value, str) else [str(item) for item in value]
    return text.rstrip("\n").split("\n")


def _json(file: IO[bytes], member: Member) -> dict[str, Any]:
    try:
        content = json.loads(read_member(file, member))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _name_of(part: str) -> str:
    """`ucm` for the folder data/ucm and for data/ucm/train-{000..007}.tar; the folder name tells data sets apart."""
    return store.base_name(store.parent(part) if part.endswith(".tar") else part)


def _split_of(url: str) -> str | None:
    words = re.split(r"[^a-z]+", store.base_name(url).lower())
    return next((split for split in SPLITS if split in words), None)
