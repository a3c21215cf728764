"""One interface for every caption source: a reader yields entries; the kind is named or detected, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ..imagery.prepare import EXTENSIONS
from ..options import ReadOptions
from ..records import Entry, Rejection, ShardError
from ..storage import json_text, store
from .caption_files import read_karpathy, read_levir_cc, read_nwpu, read_precomp
from .folders import read_folder
from .tables import TABLES, read_hf, read_table
from .tar_files import read_tar

Reader = Callable[[str, ReadOptions], Iterator[Entry | Rejection]]

READERS: dict[str, Reader] = {
    "karpathy": read_karpathy,
    "levir-cc": read_levir_cc,
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
    return read_as(*kind_of(captions, options), captions, options)


def kind_of(captions: str, options: ReadOptions) -> tuple[str, str]:
    """The kind of a source and why it is taken for that: because the options say so, or as it looks."""
    return (options.kind, "as asked") if options.kind != "auto" else detect(captions)


def read_as(kind: str, why: str, captions: str, options: ReadOptions) -> Iterator[Entry | Rejection]:
    """`read`, of a kind that is known."""
    try:
        yield from READERS[kind](captions, options)
    except (ShardError, OSError):
        raise
    except Exception as error:  # the fields', and whatever pyarrow and datasets raise for damaged files
        raise ShardError(
            f"{captions}: read as {kind} ({why}), but it is not: {type(error).__name__}: {_line(error)}."
            f" Correct it, or name the right format with --kind ({', '.join(READERS)})."
        ) from error


def _line(error: Exception) -> str:
    """The message of an error in one line; KeyError would put its own in quotes."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    return " ".join(text.split())


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
    content: Any = json_text.parse(store.read_bytes(url), url)
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        if content["images"] and isinstance(content["images"][0], dict) and "changeflag" in content["images"][0]:
            return "levir-cc", "a JSON object with a list 'images' that have a changeflag"
        return "karpathy", "a JSON object with a list 'images'"
    if isinstance(content, dict) and all(isinstance(value, list) for value in content.values()):
        return "nwpu", "a JSON object of lists, one per scene class"
    raise ShardError(
        f"{url}: neither Karpathy JSON (an object with a list 'images') nor NWPU-Captions JSON (lists by class)."
    )
