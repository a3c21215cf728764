"""Readers of the caption files that the retrieval papers share: Karpathy JSON, NWPU-Captions JSON, precomp text."""

from __future__ import annotations

import json
from collections.abc import Iterator

from ..options import ReadOptions
from ..records import Entry, Rejection, ShardError
from ..storage import store


def read_karpathy(url: str, options: ReadOptions) -> Iterator[Entry | Rejection]:
    """RSICD, RSITMD, UCM, Sydney: {"images": [{"filename", "split", "sentences": [{"raw"}]}]}.

    `raw` is used, not `tokens`: the two differ in places, and tokens have lost their punctuation.
    """
    content = json.loads(store.read_bytes(url))
    dataset = content.get("dataset")
    for row in content["images"]:
        name = f"{row['filepath']}/{row['filename']}" if row.get("filepath") else row["filename"]
        meta = {"dataset": dataset} if dataset else {}
        captions = tuple(sentence["raw"] for sentence in row["sentences"])
        yield Entry(name, captions, split=row.get("split"), label=row.get("class") or row.get("label"), meta=meta)


def read_nwpu(url: str, options: ReadOptions) -> Iterator[Entry | Rejection]:
    """NWPU-Captions: {class: [{"filename", "split", "raw", "raw_1" .. "raw_4"}]}."""
    for label, rows in json.loads(store.read_bytes(url)).items():
        for row in rows:
            names = sorted(key for key in row if key == "raw" or key.startswith("raw_"))
            if not names:
                raise KeyError("raw")
            yield Entry(row["filename"], tuple(row[name] for name in names), split=row.get("split"), label=label)


def read_precomp(folder: str, options: ReadOptions) -> Iterator[Entry | Rejection]:
    """SPLIT_caps.txt (a caption per line) beside SPLIT_filename.txt (a line per image, or per caption)."""
    caption_files = [name for name in store.listing(folder) if name.endswith("_caps.txt")]
    if not caption_files:
        raise ShardError(f"{folder}: holds no *_caps.txt.")
    for name in caption_files:
        split = name.removesuffix("_caps.txt")
        captions = _lines(store.join(folder, name))
        files = _lines(store.join(folder, f"{split}_filename.txt"))
        for file, texts in _grouped(files, captions, store.join(folder, name)):
            yield Entry(file, tuple(texts), split=split)


def _lines(url: str) -> list[str]:
    return store.read_bytes(url).decode().rstrip("\n").split("\n")


def _grouped(files: list[str], captions: list[str], where: str) -> Iterator[tuple[str, list[str]]]:
    """Captions by image, for files of a name per image or a name per caption (docs/method.md, section 3)."""
    if len(captions) % len(files):
        raise ShardError(f"{where}: {len(captions)} captions cannot be shared evenly by {len(files)} file names.")
    per_name = len(captions) // len(files)
    groups: dict[str, list[str]] = {}
    for index, file in enumerate(files):
        groups.setdefault(file, []).extend(captions[index * per_name : (index + 1) * per_name])
    yield from groups.items()
