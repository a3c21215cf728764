"""Which images of an index a query may find: by class, place on Earth, date, and DuckDB expressions on any column."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..data.outlines import OutlineError
from . import places
from .condition import ConditionError, matching
from .schema import instant
from .tiles import Tiles

_SHOWN = 200  # letters of an expression in a complaint


class SearchError(ValueError):
    """A query cannot be answered; the message says why."""


@dataclass(frozen=True, kw_only=True)
class SearchFilter:
    """Which images may be found; what is not given does not matter, and an image that lacks a given field is out.

    where = SearchFilter(bbox=(12, 50, 14, 52), since="2020", where="cloud < 10 and source like '%S2A%'")
    hits = searcher.by_text(["a river"], where=where)[0]
    """

    classes: frozenset[str] = frozenset()
    bbox: tuple[float, float, float, float] | None = None
    """West, south, east, north in degrees of WGS84; images that overlap it are in. West of 170 and east of -170 is the
    box across the antimeridian."""
    polygon: str | None = None
    """WKT or GeoJSON in WGS84; images that overlap it are in."""
    since: str | None = None
    """ISO date or time, inclusive, against the column `datetime`."""
    until: str | None = None
    """ISO date or time, inclusive: `2020` includes all of that year."""
    where: str | None = None
    """A condition in DuckDB's SQL on the columns of the index."""

    def __post_init__(self) -> None:
        self._span()
        try:
            self._regions()
        except places.PlaceError as error:
            raise SearchError(str(error)) from error

    def __call__(self, tiles: Tiles) -> NDArray[np.bool_]:
        """Which images may be found, (n,).

        Raises:
            SearchError: the expression cannot be evaluated; the message names the columns.
            ImageIndexError: the index is damaged.
        """
        allowed = np.ones(len(tiles), dtype=np.bool_)
        if not len(tiles):
            return allowed
        if self.classes:
            labels = tiles.columns(["class"])["class"]
            allowed &= _true(pc.is_in(labels, pa.array(sorted(self.classes), labels.type)))
        since, end = self._span()
        if since or end:
            times = tiles.columns(["datetime"])["datetime"]
            allowed &= _true(pc.is_valid(times))
            allowed &= _true(pc.greater_equal(times, since)) if since else True
            allowed &= _true(pc.less(times, end)) if end else True
        for region in self._regions():
            try:
                allowed &= _within(region, tiles)
            except OutlineError as error:
                raise SearchError(f"bbox, polygon: {error}; the index is damaged, build it again.") from error
        if self.where:
            allowed &= _matching(self.where, tiles)
        return allowed

    def _span(self) -> tuple[datetime | None, datetime | None]:
        """The first instant, and the first after the last."""
        return self._instant("since"), _after(self.until or "", self._instant("until"))

    def _instant(self, name: str) -> datetime | None:
        text = getattr(self, name)
        found = instant(text) if text else None
        if text and found is None:
            raise SearchError(f"{name} {text!r}: expected an ISO date such as 2020, 2020-06, 2020-06-30.")
        return found

    def _regions(self) -> list[Any]:
        return [
            *([places.box(self.bbox)] if self.bbox else []),
            *([places.polygon(self.polygon)] if self.polygon else []),
        ]


def _after(text: str, start: datetime | None) -> datetime | None:
    """The instant after the year, month, day or microsecond that starts there."""
    if start is None:
        return None
    try:
        if re.fullmatch(r"\d{4}", text):
            return start.replace(year=start.year + 1)
        if re.fullmatch(r"\d{4}-\d{2}", text):
            return (start + timedelta(days=31)).replace(day=1)
        whole_day = re.fullmatch(r"\d{4}-\d{2}-\d{2}", text)
        return start + (timedelta(days=1) if whole_day else timedelta(microseconds=1))
    except (ValueError, OverflowError):  # the end of the calendar
        return datetime.max.replace(tzinfo=timezone.utc)


def _within(region: Any, tiles: Tiles) -> NDArray[np.bool_]:
    """Which outlines overlap a region, (n,)."""
    found = np.zeros(len(tiles), dtype=np.bool_)
    for start, bounds in tiles.reaching(places.boxes(region)):

        def outlines(rows: NDArray[np.int64], start: int = start) -> list[bytes]:
            return tiles.values("geometry", start + rows)

        found[start : start + len(bounds)] = places.overlap(region, bounds, outlines)
    return found


def _true(values: pa.ChunkedArray) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = pc.fill_null(values, False).to_numpy()
    return found


def _matching(expression: str, tiles: Tiles) -> NDArray[np.bool_]:
    """Which rows (n,) an expression of DuckDB is true of; it sees the columns of the index and nothing else.

    Raises:
        SearchError: DuckDB is missing or refuses the expression, or it takes too long.
    """
    names = tiles.schema.names
    used = [name for name in names if name.lower() in expression.lower()]  # more than needed does no harm
    # Any column tells how many rows there are.
    table = _without_zones(tiles.columns(used or names[:1]))
    try:
        return matching(expression, table)
    except ConditionError as error:
        asked = expression if len(expression) < _SHOWN else f"{expression[:_SHOWN]} ..."
        raise SearchError(f"where {asked!r}: {error} The columns are {', '.join(names)}.") from error


def _without_zones(table: pa.Table) -> pa.Table:
    """Times as they are in UTC: those with a zone DuckDB would show in that of this machine."""
    kinds = [pa.timestamp(kind.unit) if pa.types.is_timestamp(kind) else kind for kind in table.schema.types]
    return table.cast(pa.schema(list(zip(table.column_names, kinds, strict=True))))
