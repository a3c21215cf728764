"""The bytes of images, wherever a plan says they lie: files, stretches of tars, cells of saved tables."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from ..records import Location, ShardError
from . import store


def read_location(location: Location) -> bytes:
    """The bytes that `place` points at: a file, a stretch of one, or a cell of a saved table."""
    if location.row is not None:
        return _read_cell(location)
    if location.offset is None or location.size is None:
        return store.read_bytes(location.url)
    if store.is_local(location.url):
        with open(store.local_path(location.url), "rb") as file:
            file.seek(location.offset)
            data = file.read(location.size)
    else:
        fs, path = store.filesystem(location.url)
        data = fs.cat_file(path, start=location.offset, end=location.offset + location.size)
    if len(data) > location.size:
        raise ShardError(f"{location.url}: its server gives whole files only, no stretches. Read a copy.")
    if len(data) != location.size:
        raise OSError(f"{location.url}: ends inside the member at byte {location.offset}")
    return data


def read_ahead(places: list[Location], threads: int = 16) -> Iterator[bytes | Exception]:
    """The bytes of each place in order; a failure comes as the exception, so that one bad file stops nothing.

    Local files are read when asked for; remote ones by `threads` requests at a time, to hide their latency.
    """
    if all(store.is_local(location.url) for location in places):
        yield from map(_read_or_error, places)
        return
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(places), 4 * threads):
            yield from pool.map(_read_or_error, places[start : start + 4 * threads])


def _read_or_error(location: Location) -> bytes | Exception:
    try:
        return read_location(location)
    except Exception as error:  # fsspec back ends raise their own types (botocore, aiohttp)
        return error


def _read_cell(location: Location) -> bytes:
    cell = _table(location.url)[location.row][location.column]
    data: bytes | None = cell["bytes"] if isinstance(cell, dict) else cell
    return data if data is not None else store.read_bytes(cell["path"])


@lru_cache(maxsize=4)
def _table(folder: str) -> Any:
    from ..readers.tables import hf_table

    return hf_table(folder)
