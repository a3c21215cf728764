"""Readers of tables: CSV, TSV and Parquet lists (SkyScript, RS5M, open_clip's own), Hugging Face data sets on disk."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..options import ReadOptions
from ..records import Entry, Location, Rejection, ShardError
from ..storage import store

IMAGE_COLUMNS = (
    "filepath",
    "file_path",
    "path",
    "filename",
    "file_name",
    "image_path",
    "img_path",
    "image",
    "img_name",
)
CAPTION_STEMS = ("caption", "title", "text", "sentence", "raw", "description")
LABEL_COLUMNS = ("class", "label", "category", "scene")
TABLES = (".csv", ".tsv", ".txt", ".parquet")
Row = dict[str, Any]


def read_table(url: str, options: ReadOptions) -> Iterator[Entry | Rejection]:
    """One row per image with one or more caption columns, or one row per caption with the image repeated."""
    columns = _columns(url)
    image = options.image_column or _first(columns, IMAGE_COLUMNS, url, "image")
    captions = options.caption_columns or caption_columns(columns, url)
    split, label = (
        _named(columns, options.split_column, ("split",)),
        _named(columns, options.label_column, LABEL_COLUMNS),
    )
    for name in (image, *captions, *filter(None, (options.split_column, options.label_column))):
        if name not in columns:
            raise ShardError(f"{url}: no column {name!r}; it has {', '.join(columns)}.")
    for name, rows in _by_image(url, image):
        texts = tuple(text for row in rows for column in captions for text in _texts(row[column]))
        where = rows[0].get(split) if split else None
        yield Entry(name, texts, split=str(where) if where else None, label=_label(rows[0], label))


def read_hf(url: str, options: ReadOptions) -> Iterator[Entry | Rejection]:
    """A `datasets` data set saved with `save_to_disk`: one split, or a folder of splits."""
    for folder, split in _hf_splits(url):
        table = hf_table(folder)
        columns = table.column_names
        images = [name for name, feature in table.features.items() if type(feature).__name__ == "Image"]
        image = options.image_column or _first(columns, (*images, *IMAGE_COLUMNS), folder, "image")
        captions = options.caption_columns or caption_columns([name for name in columns if name != image], folder)
        label = _named(columns, options.label_column, LABEL_COLUMNS)
        names = getattr(table.features[label], "names", None) if label else None
        texts_only = table.select_columns([name for name in columns if name != image])
        for index, row in enumerate(texts_only):
            texts = tuple(text for column in captions for text in _texts(row[column]))
            text_label = names[row[label]] if label and names else _label(row, label)
            place = Location(folder, row=index, column=image)
            part = row.get(options.split_column or "split") or split
            yield Entry(place, texts, split=part, label=text_label, image_id=f"{split or 'row'}_{index:08d}")


def hf_table(folder: str) -> Any:
    """A saved data set, with its images left encoded."""
    try:
        import datasets
    except ImportError as error:
        raise ShardError(f"{folder}: reading Hugging Face data sets needs `pip install datasets`.") from error
    table = datasets.load_from_disk(folder)
    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    return table


def caption_columns(columns: Iterable[str], where: str) -> tuple[str, ...]:
    """All columns that are named like captions; caption, caption_1, …"""
    columns = list(columns)
    for stem in CAPTION_STEMS:
        found = tuple(name for name in columns if name.lower().rstrip("s0123456789_") == stem)
        if found:
            return found
    raise ShardError(
        f"{where}: no column looks like captions among {', '.join(columns)}; name them: --caption-columns."
    )


def _by_image(url: str, image: str) -> Iterator[tuple[str, list[Row]]]:
    """Rows by image: neighbours as they come, all of the table in memory only if one image's rows lie apart."""
    seen: set[int] = set()
    apart = False
    for name, _ in itertools.groupby(_rows(url), key=lambda row: row[image]):
        apart = apart or hash(name) in seen
        seen.add(hash(name))
    if not apart:
        yield from ((str(name), list(rows)) for name, rows in itertools.groupby(_rows(url), key=lambda row: row[image]))
        return
    groups: dict[str, list[Row]] = {}
    for row in _rows(url):
        groups.setdefault(str(row[image]), []).append(row)
    yield from groups.items()


def _rows(url: str) -> Iterator[Row]:
    if url.endswith(".parquet"):
        for batch in _parquet(url).iter_batches(8192):
            yield from batch.to_pylist()
        return
    with store.open_read(url) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        for number, row in enumerate(csv.DictReader(text, delimiter=_delimiter(url)), start=2):
            if None in row or None in row.values():
                raise ShardError(f"{url}: line {number} has not as many fields as the header; is a caption unquoted?")
            yield row


def _columns(url: str) -> list[str]:
    if url.endswith(".parquet"):
        return list(_parquet(url).schema_arrow.names)
    with store.open_read(url) as file:
        header = file.readline().decode("utf-8-sig")
    return next(csv.reader([header], delimiter=_delimiter(url)), [])


def _delimiter(url: str) -> str:
    with store.open_read(url) as file:
        header = file.readline().decode("utf-8-sig")
    return "\t" if "\t" in header else ";" if ";" in header and "," not in header else ","


def _parquet(url: str) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ShardError(f"{url}: reading Parquet needs `pip install pyarrow`.") from error
    return pyarrow.parquet.ParquetFile(store.open_read(url))


def _texts(value: Any) -> list[str]:
    """One caption, or several as a list or a JSON list."""
    if value is None:
        return []
    if isinstance(value, str):
        if value.startswith("[") and value.endswith("]"):
            try:
                value = json.loads(value)
            except ValueError:
                return [value]
            return [str(text) for text in value]
        return [value]
    return [str(text) for text in value] if isinstance(value, Sequence) else [str(value)]


def _first(columns: Sequence[str], wanted: Iterable[str], where: str, what: str) -> str:
    for name in wanted:
        if name in columns:
            return name
    raise ShardError(f"{where}: no column looks like the {what} among {', '.join(columns)}; name it: --{what}-column.")


def _named(columns: Sequence[str], asked: str | None, usual: Sequence[str]) -> str | None:
    return asked or next((name for name in usual if name in columns), None)


def _label(row: Row, column: str | None) -> str | None:
    return str(row[column]) if column and row.get(column) not in (None, "") else None


def _hf_splits(url: str) -> list[tuple[str, str | None]]:
    listing = store.join(url, "dataset_dict.json")
    if not store.exists(listing):
        return [(url, None)]
    return [(store.join(url, split), split) for split in json.loads(store.read_bytes(listing))["splits"]]
