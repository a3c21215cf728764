"""Readers of the caption files that papers share: JSON of Karpathy, LEVIR-CC and NWPU-Captions, precomp text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from ..options import ReadOptions
from ..records import Entry, Rejection, ShardError
from ..storage import json_text, store
from . import fields


def read_karpathy(url: str, options: ReadOptions) -> Iterator[Entry | Rejection]:
    """RSICD, RSITMD, UCM, Sydney: {"images": [{"filename", "split", "sentences": [{"raw"}]}]}.

    `raw` is used, not `tokens`: the two differ in places, and tokens have lost their punctuation.  A place at several
    dates has `filenames`, in order of date, and may have `dates` beside them.
    """
    for row, where, meta in _karpathy_rows(url):
        folder = fields.label(row.get("filepath"), f"{where}.filepath")
        names, dates = _filenames(row, where)
        image, *later = (f"{folder}/{name}" if folder else name for name in names)
        label = row.get("class") or row.get("label")
        yield Entry(
            image,
            _sentences(row, where),
            split=fields.label(row.get("split"), f"{where}.split"),
            label=fields.label(label, f"{where}.class"),
            meta=meta | ({"dates": dates} if dates else {}),
            later=tuple(later),
        )


def read_levir_cc(url: str, options: ReadOptions) -> Iterator[Entry | Rejection]:
    """LEVIR-CC: Karpathy's JSON with a `changeflag`; the images are FILEPATH/A/FILENAME, later FILEPATH/B/FILENAME.

    The class says whether anything changed.
    """
    for row, where, meta in _karpathy_rows(url):
        folder = fields.label(row.get("filepath"), f"{where}.filepath")
        name, above = fields.member(row, "filename", str, where), f"{folder}/" if folder else ""
        changed = fields.member(row, "changeflag", int, where)
        yield Entry(
            f"{above}A/{name}",
            _sentences(row, where),
            split=fields.label(row.get("split"), f"{where}.split"),
            label="change" if changed else "no change",
            image_id=f"{above}{PurePosixPath(name).stem}",
            meta=meta,
            later=(f"{above}B/{name}",),
        )


def _karpathy_rows(url: str) -> Iterator[tuple[Any, str, dict[str, Any]]]:
    """Rows of a Karpathy JSON, where each stands, and what the file says of all of them."""
    content = fields.typed(json_text.parse(store.read_bytes(url), url), dict, "the file")
    dataset = content.get("dataset")
    for index, row in enumerate(fields.member(content, "images", list, "")):
        yield fields.typed(row, dict, f"images[{index}]"), f"images[{index}]", {"dataset": dataset} if dataset else {}


def _filenames(row: Any, where: str) -> tuple[list[str], list[str | None] | None]:
    """The files of a row in order of date, and their dates where the row has them."""
    if "filenames" not in row:
        return [fields.member(row, "filename", str, where)], None
    listed = fields.member(row, "filenames", list, where)
    names = [fields.typed(name, str, f"{where}.filenames[{at}]") for at, name in enumerate(listed)]
    dates = None if row.get("dates") is None else fields.dates(row["dates"], f"{where}.dates")
    if not names or (dates is not None and len(dates) != len(names)):
        raise TypeError(f"{where}: {len(names)} filenames and {len(dates or ())} dates; each image needs its own")
    return names, dates


def _sentences(row: Any, where: str) -> tuple[str, ...]:
    sentences = fields.member(row, "sentences", list, where) if row.get("sentences", ()) is not None else []
    return tuple(_raw(sentence, f"{where}.sentences[{at}]") for at, sentence in enumerate(sentences))


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
        while len(files) > 1 and not files[-1]:
            files.pop()  # no image has a blank name, but an image's captions may be blank
        while len(captions) % len(files) and not captions[-1]:
            captions.pop()  # more blank lines than the last image has captions, at the end of some published files
        for file, texts in _grouped(files, captions, store.join(folder, name)):
            yield Entry(file, tuple(texts), split=split)


def _lines(url: str) -> list[str]:
    """The lines of a file, blank ones at its end, too: they count when captions are shared among images."""
    text = fields.decoded(store.read_bytes(url), url)
    return [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]


def _grouped(files: list[str], captions: list[str], where: str) -> Iterator[tuple[str, list[str]]]:
    """Captions by image, for files of a name per image or a name per caption (docs/method.md, section 3)."""
    if len(captions) % len(files):
        raise ShardError(f"{where}: {len(captions)} captions cannot be shared evenly by {len(files)} file names.")
    per_name = len(captions) // len(files)
    groups: dict[str, list[str]] = {}
    for index, file in enumerate(files):
        groups.setdefault(file, []).extend(captions[index * per_name : (index + 1) * per_name])
    yield from groups.items()
