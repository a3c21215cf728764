"""Readers of the caption files that the retrieval papers share: Karpathy JSON, NWPU-Captions JSON, precomp text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..options import ReadOptions
from ..records import Entry, Rejection, ShardError
from ..storage import json_text, store
from . import fields


def read_karpathy(url: str, options: ReadOptions) -> Iterator[Entry | Rejection]:
    """RSICD, RSITMD, UCM, Sydney: {"images": [{"filename", "split", "sentences": [{"raw"}]}]}.

    `raw` is used, not `tokens`: the two differ in places, and tokens have lost their punctuation.
    """
    content = fields.typed(json_text.parse(store.read_bytes(url), url), dict, "the file")
    dataset = content.get("dataset")
    meta = {"dataset": dataset} if dataset else {}
    for index, row in enumerate(fields.member(content, "images", list, "")):
        where = f"images[{index}]"
        name = fields.member(row, "filename", str, where)
        folder = fields.label(row.get("filepath"), f"{where}.filepath")
        sentences = fields.member(row, "sentences", list, where) if row.get("sentences", ()) is not None else []
        captions = tuple(_raw(sentence, f"{where}.sentences[{at}]") for at, sentence in enumerate(sentences))
        label = row.get("class") or row.get("label")
        yield Entry(
            f"{folder}/{name}" if folder else name,
            captions,
            split=fields.label(row.get("split"), f"{where}.split"),
            label=fields.label(label, f"{where}.class"),
            meta=meta,
        )


def _raw(sentence: Any, where: str) -> str:
    """The caption of a sentence; blank where it is null, so that it is counted."""
    if isinstance(sentence, dict) and sentence.get("raw", "") is None:
        return ""
    return fields.member(sentence, "raw", str, where)


def read_nwpu(url: str, options: ReadOptions) -> Iterator[Entry | Rejection]:
    """NWPU-Captions: {class: [{"filename", "split", "raw", "raw_1" .. "raw_4"}]}."""
    content = json_text.parse(store.read_bytes(url), url)
    for label, rows in fields.typed(content, dict, "the file").items():
        for index, row in enumerate(fields.typed(rows, list, label)):
            where = f"{label}[{index}]"
            file = fields.member(row, "filename", str, where)
            names = sorted(key for key in row if key == "raw" or key.startswith("raw_"))
            if not names:
                raise KeyError(f"{where} has no 'raw'")
            captions = tuple("" if row[name] is None else fields.member(row, name, str, where) for name in names)
            yield Entry(file, captions, split=fields.label(row.get("split"), f"{where}.split"), label=label)


def read_precomp(folder: str, options: ReadOptions) -> Iterator[Entry | Rejection]:
    """SPLIT_caps.txt (a caption per line) beside SPLIT_filename.txt (a line per image, or per caption)."""
    caption_files = [name for name in store.names(folder) if name.endswith("_caps.txt")]
    if not caption_files:
        raise ShardError(f"{folder}: holds no *_caps.txt.")
    for name in caption_files:
        split = name.removesuffix("_caps.txt")
        captions = _lines(store.join(folder, name))
        files = _lines(store.join(folder, f"{split}_filename.txt"))
        for file, texts in _grouped(files, captions, store.join(folder, name)):
            yield Entry(file, tuple(texts), split=split)


def _lines(url: str) -> list[str]:
    text = fields.decoded(store.read_bytes(url), url)
    return [line.rstrip("\r") for line in text.rstrip("\n").split("\n")]


def _grouped(files: list[str], captions: list[str], where: str) -> Iterator[tuple[str, list[str]]]:
    """Captions by image, for files of a name per image or a name per caption (docs/method.md, section 3)."""
    if len(captions) % len(files):
        raise ShardError(f"{where}: {len(captions)} captions cannot be shared evenly by {len(files)} file names.")
    per_name = len(captions) // len(files)
    groups: dict[str, list[str]] = {}
    for index, file in enumerate(files):
        groups.setdefault(file, []).extend(captions[index * per_name : (index + 1) * per_name])
    yield from groups.items()
