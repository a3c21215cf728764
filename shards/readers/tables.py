"""Readers of tables: CSV, TSV and Parquet lists (SkyScript, RS5M, open_clip's own), Hugging Face data sets on disk."""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import PurePosixPath
from typing import Any

from ..imagery.prepare import EXTENSIONS
from ..options import ReadOptions
from ..records import Entry, Location, Rejection, ShardError
from ..storage import json_text, store
from . import fields

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
    columns = columns_of(url)
    image = options.image_column or _first(columns, IMAGE_COLUMNS, url, "image")
    captions = tuple(dict.fromkeys(options.caption_columns)) or caption_columns(columns, url)
    split, label = (
        _named(columns, options.split_column, ("split",)),
        _named(columns, options.label_column, LABEL_COLUMNS),
    )
    for name in (image, *captions, *filter(None, (options.split_column, options.label_column))):
        if name not in columns:
            raise ShardError(f"{url}: no column {name!r}; it has {', '.join(columns)}.")
    for name, rows in rows_by_image(url, image):
        texts = tuple(
            text for row in rows for column in captions for text in fields.captions(row[column], f"{name}: {column}")
        )
        splits = dict.fromkeys(fields.label(row.get(split), "split") for row in rows) if split else {None: None}
        if len(splits) > 1:
            yield Rejection(name, "several splits", f"its rows say {', '.join(map(str, splits))}")
            continue
        where = next(iter(splits))
        yield Entry(name, texts, split=where, label=_label(rows[0], label))


def read_hf(url: str, options: ReadOptions) -> Iterator[Entry | Rejection]:
    """A `datasets` data set saved with `save_to_disk`: one split, or a folder of splits."""
    for folder, split in _hf_splits(url):
        table = hf_table(folder)
        columns = table.column_names
        images = [name for name, feature in table.features.items() if type(feature).__name__ == "Image"]
        image = options.image_column or _first(columns, (*images, *IMAGE_COLUMNS), folder, "image")
        others = [name for name in columns if name != image]
        captions = tuple(dict.fromkeys(options.caption_columns)) or caption_columns(others, folder)
        label = _named(columns, options.label_column, LABEL_COLUMNS)
        names = getattr(table.features[label], "names", None) if label else None
        texts_only = table.select_columns(others)
        for index, row in enumerate(texts_only):
            texts = tuple(text for column in captions for text in fields.captions(row[column], f"row {index}.{column}"))
            text_label = _class_name(row[label], names) if label and names else _label(row, label)
            place = Location(folder, row=index, column=image)
            part = fields.label(row.get(options.split_column or "split"), f"row {index}: split") or split
            yield Entry(place, texts, split=part, label=text_label, image_id=f"{split or 'row'}_{index:08d}")


def hf_table(folder: str) -> Any:
    """A saved data set, with its images left encoded.

    Raises:
        ShardError: `datasets` is not installed, or a file is a pipe or device, for which it would wait without end.
    """
    try:
        import datasets
    except ImportError as error:
        raise ShardError(f"{folder}: reading Hugging Face data sets needs `pip install datasets`.") from error
    for name in store.listing(folder):
        store.require_regular(store.join(folder, name))
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


def rows_by_image(url: str, image: str, delimiter: str | None = None) -> Iterator[tuple[str, list[Row]]]:
    """Rows by image: neighbours as they come, all of the table in memory only if one image's rows lie apart.

    Args:
        url: the table.
        image: its column with the names of images; blank where a row has none.
        delimiter: of a CSV; None: the one that its header has.
    Raises:
        ShardError: a row has not as many fields as the header, a quote is stray, or a line is not UTF-8.
    """
    seen: set[int] = set()
    apart = False
    for name, _ in itertools.groupby(_named_rows(url, image, delimiter), key=itemgetter(0)):
        apart = apart or hash(name) in seen
        seen.add(hash(name))
    if not apart:
        neighbours = itertools.groupby(_named_rows(url, image, delimiter), key=itemgetter(0))
        yield from ((name, [row for _, row in rows]) for name, rows in neighbours)
        return
    groups: dict[str, list[Row]] = {}
    for name, row in _named_rows(url, image, delimiter):
        groups.setdefault(name, []).append(row)
    yield from groups.items()


def _named_rows(url: str, image: str, delimiter: str | None) -> Iterator[tuple[str, Row]]:
    """Rows with the name of their image; blank where there is none."""
    for number, row in enumerate(_rows(url, image, delimiter)):
        yield fields.label(row[image], f"row {number}.{image}") or "", row


def _rows(url: str, image: str, delimiter: str | None) -> Iterator[Row]:
    if url.endswith(".parquet"):
        for batch in _parquet(url).iter_batches(8192):
            yield from batch.to_pylist()
        return
    delimiter = delimiter or _delimiter(url)
    lines = _csv_lines(url, delimiter)
    _, header = next(lines)
    at = header.index(image)
    for line, row in lines:
        if len(row) != len(header):
            raise ShardError(f"{url}: line {line} has not as many fields as the header; is a caption unquoted?")
        if any("\n" in field or "\r" in field for field in row) and _swallows(row, at, delimiter):
            raise ShardError(f"{url}: line {line}: a quoted field goes on over other rows; {_QUOTES}")
        yield dict(zip(header, row, strict=True))


def _csv_lines(url: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not empty, with the number of the line where each begins.

    Raises:
        ShardError: a quote is left open or stands where none may, a field is too long, a line is not UTF-8.
    """
    with store.open_read(url) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        while True:
            line = reader.line_num + 1
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise ShardError(f"{url}: line {line}: {error}; {_QUOTES}") from error
            if not fields.encodable(*row):
                raise fields.not_utf8(url, line)
            if row:
                yield line, row


_QUOTES = 'is a quote stray? A quoted field begins and ends with ", and a " within it is doubled.'


def _swallows(row: list[str], image: int, delimiter: str) -> bool:
    """True if lines within a field look like rows: where the image's name stands in a row they have one like it."""
    kind = _suffix(row[image])
    for column, field in enumerate(row):
        first, *lines = (line.split(delimiter) for line in re.split("[\r\n]+", field))
        ends = [first[image - column]] if lines and column < image < column + len(first) else []
        names = ends + [cells[image] for cells in lines if len(cells) > image]
        if any(_suffix(name) in EXTENSIONS for name in names):
            return True
        if not kind and any(len(cells) == len(row) for cells in lines):
            return True
    return False


def _suffix(name: str) -> str:
    return PurePosixPath(name.strip(' "')).suffix.lower()


def columns_of(url: str, delimiter: str | None = None) -> list[str]:
    """The columns of a table.

    Raises:
        ShardError: two have one name.
    """
    if url.endswith(".parquet"):
        columns = list(_parquet(url).schema_arrow.names)
    else:
        columns = next(_csv_lines(url, delimiter or _delimiter(url)), (1, list[str]()))[1]
    doubles = [name for name in columns if columns.count(name) > 1]
    if doubles:
        raise ShardError(f"{url}: two columns are called {doubles[0]!r}; rename one of them.")
    return columns


def _delimiter(url: str) -> str:
    with store.open_read(url) as file:
        header = re.split("[\r\n]", file.readline().decode("utf-8-sig", "replace"))[0]
    return "\t" if "\t" in header else ";" if ";" in header and "," not in header else ","


def _parquet(url: str) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ShardError(f"{url}: reading Parquet needs `pip install pyarrow`.") from error
    return pyarrow.parquet.ParquetFile(store.open_read(url))


def _first(columns: Sequence[str], wanted: Iterable[str], where: str, what: str) -> str:
    for name in wanted:
        if name in columns:
            return name
    raise ShardError(f"{where}: no column looks like the {what} among {', '.join(columns)}; name it: --{what}-column.")


def _named(columns: Sequence[str], asked: str | None, usual: Sequence[str]) -> str | None:
    return asked or next((name for name in usual if name in columns), None)


def _label(row: Row, column: str | None) -> str | None:
    return fields.label(row.get(column), column) if column else None


def _class_name(number: int | None, names: Sequence[str]) -> str | None:
    """The name of a class by its number; -1 and null stand for an image without one."""
    return None if number is None or number < 0 else names[number]


def _hf_splits(url: str) -> list[tuple[str, str | None]]:
    listing = store.join(url, "dataset_dict.json")
    if not store.exists(listing):
        return [(url, None)]
    content = json_text.parse(store.read_bytes(listing), listing)
    return [(store.join(url, split), split) for split in fields.member(content, "splits", list, "")]
