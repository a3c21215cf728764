"""What an index knows of its images: a sequence of images, or columns of all of them, decoded when asked for."""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..data.captioned import CaptionedImage
from .checksums import CheckedFile
from .files import damaged, open_parquet, read_columns
from .places import NOWHERE, Box, touch
from .schema import bounds, columns_of_images, to_images

_GROUPS_KEPT = 128  # of some 0.3 MB


class _Part:
    """The metadata of a segment; a column that is read whole is decoded once and kept."""

    def __init__(self, segment: Path, checked: CheckedFile, images: int, extent: Box | None) -> None:
        self.segment, self.images, self.extent, self._checked = segment, images, extent, checked
        self._columns: dict[str, pa.ChunkedArray] = {}

    @functools.cached_property
    def schema(self) -> pa.Schema:
        return self._file.schema_arrow

    @functools.cached_property
    def _file(self) -> pa.parquet.ParquetFile:
        return open_parquet(self.segment, self._checked)

    @functools.cached_property
    def group_ends(self) -> list[int]:
        """Behind the last row of each row group.

        Raises:
            ImageIndexError: another number of rows is there.
        """
        about = self._file.metadata
        rows = [about.row_group(number).num_rows for number in range(about.num_row_groups)]
        if min(rows, default=0) < 0 or sum(rows) != self.images:
            raise damaged(self.segment, f"Parquet: {sum(rows)} rows in row groups, expected {self.images}")
        return list(itertools.accumulate(rows))

    def table(self, names: Iterable[str]) -> pa.Table:
        """Some columns, (n) rows."""
        new = [name for name in names if name not in self._columns]
        if new:
            table = read_columns(self.segment, self._file, new, self.images)
            self._columns |= dict(zip(new, table.columns, strict=True))
        return pa.table({name: self._columns[name] for name in names})

    def group(self, number: int) -> pa.Table:
        """What images are made of, of a row group."""
        rows = self.group_ends[number] - (self.group_ends[number - 1] if number else 0)
        return read_columns(self.segment, self._file, columns_of_images(self.schema), rows, number)

    def bounds(self) -> NDArray[np.float64]:
        """(n, 4) of the outlines, NaN where nothing is known."""
        return bounds(read_columns(self.segment, self._file, ["bbox"], self.images))

    def image(self, group: pa.Table, row: int) -> CaptionedImage:
        """The image in a row of a row group."""
        try:
            return to_images(group.slice(row, 1))[0]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise damaged(
                self.segment, f"{self._checked.path.name} row {row}: {type(error).__name__}: {error}"
            ) from error


def united(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """The columns of all schemas; one that is of several kinds of numbers is float64, of other kinds text.

    Names that differ in case alone are one column, as engines have it, called as it is first.
    """
    found: dict[str, pa.Field] = {}
    for field in (field for schema in schemas for field in schema):
        before = found.setdefault(field.name.lower(), pa.field(field.name, field.type))
        if before.type != field.type:
            numbers = all(pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in (before.type, field.type))
            found[field.name.lower()] = before.with_type(pa.float64() if numbers else pa.string())
    return pa.schema(list(found.values()))


def in_schema(table: pa.Table, schema: pa.Schema, rows: int | None = None) -> pa.Table:
    """The columns of a schema in its types, null where the table lacks one.

    Args:
        table: with other columns, perhaps, which go, or with none.
        schema: the wanted columns.
        rows: how many the table has, which one without columns does not know.
    """
    count = len(table) if rows is None else rows
    there = _by_name(table.column_names)
    columns = [
        _as(table[there[field.name.lower()]], field.type)
        if field.name.lower() in there
        else pa.chunked_array([pa.nulls(count, field.type)])
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _by_name(names: Iterable[str]) -> dict[str, str]:
    """Names by what they are without regard to case, the first of several."""
    return {name.lower(): name for name in reversed(list(names))}


def _as(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """A column in a type; lists and structs become JSON where text is wanted."""
    if not (pa.types.is_nested(column.type) and pa.types.is_string(kind)):
        return column.cast(kind)
    texts = [None if value is None else json.dumps(value, default=str) for value in column.to_pylist()]
    return pa.chunked_array([pa.array(texts, kind)])


def _place(ends: Sequence[int], row: int) -> tuple[int, int]:
    """In which of the parts that end so a row is, and where in it."""
    number = bisect.bisect_right(ends, row)
    return number, row - (ends[number - 1] if number else 0)


class Tiles(Sequence[CaptionedImage]):
    """The images of all segments as a sequence, and their columns as one table."""

    def __init__(self) -> None:
        self._parts: list[_Part] = []
        self._ends: list[int] = []
        self._schema: pa.Schema | None = None
        self._bounds = np.empty((0, 4), dtype=np.float64)
        self._has_bounds: set[int] = set()
        self._decoding = threading.Lock()  # the map's server asks from several threads
        self._group = functools.lru_cache(_GROUPS_KEPT)(lambda part, group: self._parts[part].group(group))

    def append(self, segment: Path, checked: CheckedFile, images: int, extent: Box | None) -> None:
        """Add the images of a segment, all within a box; None if no place is known.  Nothing is read yet."""
        self._schema = None
        self._parts.append(_Part(segment, checked, images, extent))
        self._ends.append(len(self) + images)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, row: int) -> CaptionedImage: ...
    @overload
    def __getitem__(self, row: slice) -> list[CaptionedImage]: ...
    def __getitem__(self, row: int | slice) -> CaptionedImage | list[CaptionedImage]:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        if not 0 <= row < len(self):
            raise IndexError(row)  # ends iteration
        number, row = _place(self._ends, row)
        part = self._parts[number]
        group, row = _place(part.group_ends, row)
        return part.image(self._group(number, group), row)

    @property
    def schema(self) -> pa.Schema:
        """The columns of all segments; one that is of several kinds is text."""
        if self._schema is None:
            self._schema = united(part.schema for part in self._parts)
        return self._schema

    def reaching(self, boxes: NDArray[np.float64]) -> list[tuple[int, NDArray[np.float64]]]:
        """Segments that reach into some boxes (k, 4): the first row and the bounds (m, 4) of each run of them.

        No other segment is read.  Bounds are NaN where nothing is known, and each side of them lies together; they are
        decoded once and kept.
        """
        near = touch(boxes, np.array([part.extent or NOWHERE for part in self._parts]).reshape(-1, 4)).tolist()
        starts = [end - part.images for part, end in zip(self._parts, self._ends, strict=True)]
        with self._decoding:
            if len(self._bounds) < len(self):
                grown = np.empty((len(self), 4), order="F")  # memory that nothing is written to costs nothing
                grown[: len(self._bounds)] = self._bounds
                self._bounds = grown
            for number in set(np.flatnonzero(near).tolist()) - self._has_bounds:
                self._bounds[starts[number] : self._ends[number]] = self._parts[number].bounds()
                self._has_bounds.add(number)
        runs = (list(run) for wanted, run in itertools.groupby(range(len(near)), near.__getitem__) if wanted)
        return [(starts[run[0]], self._bounds[starts[run[0]] : self._ends[run[-1]]]) for run in runs]

    def values(self, name: str, rows: NDArray[np.int64]) -> list[Any]:
        """Values of a column (k,) in some ascending rows (k,); other segments are not read."""
        segment, found = np.searchsorted(self._ends, rows, side="right"), list[Any]()
        for number in np.unique(segment).tolist():
            first = self._ends[number] - self._parts[number].images
            column = self._parts[number].table([name])[name]
            found += column.take(pa.array(rows[segment == number] - first)).to_pylist()
        return found

    def columns(self, names: Sequence[str]) -> pa.Table:
        """Some columns of all images, in their order; null where a segment lacks one."""
        schema = pa.schema([self.schema.field(name) for name in names])
        tables = [self._columns(part, schema) for part in self._parts]
        return pa.concat_tables(tables) if tables else schema.empty_table()

    @staticmethod
    def _columns(part: _Part, schema: pa.Schema) -> pa.Table:
        there = _by_name(part.schema.names)
        wanted = [there[name.lower()] for name in schema.names if name.lower() in there]
        return in_schema(part.table(wanted), schema, part.images)
