"""One interface for every caption source: a reader yields entries; the kind is named or detected, with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from ..imagery.prepare import EXTENSIONS
from ..options import ReadOptions
from ..records import Entry, Rejection, ShardError
from ..storage import store
from .caption_files import read_karpathy, read_nwpu, read_precomp
from .folders import read_folder
from .tables import TABLES, read_hf, read_table
from .tar_files import read_tar

Reader = Callable[[str, ReadOptions], Iterator[Entry | Rejection]]

READERS: dict[str, Reader] = {
    "karpathy": read_karpathy,
    "nwpu": read_nwpu,
    "precomp": read_precomp,
    "table": read_table,
    "folder": read_folder,
    "tar": read_tar,
    "hf": read_hf,
}


def detect(captions: str) -> tuple[str, str]:
    """The kind of a caption source and why it is taken for that.

    Raises:
        ShardError: it does not exist, or looks like none of the kinds.
    """
    if captions.endswith(".tar") or "::" in captions:
        return "tar", "it names .tar files"
    if not store.exists(captions):
        raise ShardError(f"{captions}: no such file or folder.")
    if store.is_folder(captions):
        return _detect_folder(captions)
    if captions.endswith(".json"):
        return _detect_json(captions)
    if captions.endswith(TABLES):
        return "table", f"the name ends in .{captions.rsplit('.', 1)[-1]}"
    raise ShardError(f"{captions}: the name does not tell its format; say it with --kind ({', '.join(READERS)}).")


def read(captions: str, options: ReadOptions) -> Iterator[Entry | Rejection]:
    """All entries of a source, in its order.

    Raises:
        ShardError: the source is not what its kind says; the message tells how the kind was chosen.
    """
    kind, why = (options.kind, "as asked") if options.kind != "auto" else detect(captions)
    try:
        yield from READERS[kind](captions, options)
    except (KeyError, TypeError, AttributeError, IndexError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ShardError(
            f"{captions}: read as {kind} ({why}), but it is not: {type(error).__name__}: {error}."
            f" Name the right format with --kind ({', '.join(READERS)})."
        ) from error


def _detect_folder(folder: str) -> tuple[str, str]:
    names = store.listing(folder)
    top = [name for name in names if "/" not in name]
    if any(name.endswith("_caps.txt") for name in top):
        return "precomp", "the folder holds *_caps.txt"
    if any(name.endswith(".tar") for name in top):
        return "tar", "the folder holds .tar files"
    if "dataset_dict.json" in top or {"dataset_info.json", "state.json"} <= set(top):
        return "hf", "the folder holds a saved Hugging Face data set"
    if any(name.lower().endswith(EXTENSIONS) for name in names):
        return "folder", "the folder holds folders of images"
    found = ", ".join(names[:5]) or "nothing"
    raise ShardError(f"{folder}: no *_caps.txt, no .tar, no saved data set, no image in it; found {found}.")


def _detect_json(url: str) -> tuple[str, str]:
    content: Any = json.loads(store.read_bytes(url))
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        return "karpathy", "a JSON object with a list 'images'"
    if isinstance(content, dict) and all(isinstance(value, list) for value in content.values()):
        return "nwpu", "a JSON object of lists, one per scene class"
    raise ShardError(
        f"{url}: neither Karpathy JSON (an object with a list 'images') nor NWPU-Captions JSON (lists by class)."
    )
