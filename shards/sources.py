"""The bytes of images, wherever a plan says they lie: files, stretches of tars, cells of saved tables."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from . import store
from .records import Location, ShardError


def read_location(place: Location) -> bytes:
    """The bytes that `place` points at: a file, a stretch of one, or a cell of a saved table."""
    if place.row is not None:
        return _read_cell(place)
    if place.offset is None or place.size is None:
        return store.read_bytes(place.url)
    if store.is_local(place.url):
        with open(store.local_path(place.url), "rb") as file:
            file.seek(place.offset)
            data = file.read(place.size)
    else:
        fs, path = store.filesystem(place.url)
        data = fs.cat_file(path, start=place.offset, end=place.offset + place.size)
    if len(data) > place.size:
        raise ShardError(f"{place.url}: its server gives whole files only, no stretches. Read a copy.")
    if len(data) != place.size:
        raise OSError(f"{place.url}: ends inside the member at byte {place.offset}")
    return data


def read_ahead(places: list[Location], threads: int = 16) -> Iterator[bytes | Exception]:
    """The bytes of each place in order; a failure comes as the exception, so that one bad file stops nothing.

    Local files are read when asked for; remote ones by `threads` requests at a time, to hide their latency.
    """
    if all(store.is_local(place.url) for place in places):
        yield from map(_read_or_error, places)
        return
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(places), 4 * threads):
            yield from pool.map(_read_or_error, places[start : start + 4 * threads])


def _read_or_error(place: Location) -> bytes | Exception:
    try:
        return read_location(place)
    except Exception as error:  # fsspec back ends raise their own types (botocore, aiohttp)
        return error


def _read_cell(place: Location) -> bytes:
    cell = _table(place.url)[place.row][place.column]
    data: bytes | None = cell["bytes"] if isinstance(cell, dict) else cell
    return data if data is not None else store.read_bytes(cell["path"])


@lru_cache(maxsize=4)
def _table(folder: str) -> Any:
    from .tables import hf_table

    return hf_table(folder)
