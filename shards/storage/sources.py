"""The bytes of images, wherever a plan says they lie: files, stretches of tars, cells of saved tables."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from hashlib import sha256
from typing import Any

from ..records import Location, ShardError
from . import store
from .tars import MOST_IMAGE_BYTES

_THREADS = 16


def read_location(location: Location) -> bytes:
    """The bytes that `location` points at: a file, a stretch of one, or a cell of a saved table.

    Raises:
        ShardError: it is no regular file, or larger than MOST_IMAGE_BYTES; nothing has been read then.
        OSError: it cannot be read.
    """
    if location.row is not None:
        return _read_cell(location)
    if location.offset is None or location.size is None:
        return store.read_bytes(location.url, MOST_IMAGE_BYTES)
    store.require_size(location.url, location.size, MOST_IMAGE_BYTES)
    if store.is_local(location.url):
        with store.open_regular(store.local_path(location.url)) as file:
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


def read_ahead(places: list[Location], threads: int = _THREADS) -> Iterator[bytes | Exception]:
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
    if data is not None:
        return data
    if not store.is_inside(cell["path"], location.url):
        raise ShardError(f"{cell['path']}: lies outside the data set; save it again with its images (save_to_disk).")
    return store.read_bytes(cell["path"], MOST_IMAGE_BYTES)


class Versions:
    """The versions of files, each asked for once."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def of(self, locations: list[Location]) -> str:
        """One mark for the files that hold all of these: it changes if one of them does."""
        new = list(dict.fromkeys(location.url for location in locations if location.url not in self._known))
        if all(map(store.is_local, new)):
            self._known.update((url, store.version(url)) for url in new)
        else:
            with ThreadPoolExecutor(_THREADS) as pool:
                self._known.update(zip(new, pool.map(store.version, new), strict=True))
        mark = sha256()
        for location in locations:
            mark.update(f"{self._known[location.url]}\n".encode())
        return mark.hexdigest()


@lru_cache(maxsize=4)
def _table(folder: str) -> Any:
    from ..readers.tables import hf_table

    return hf_table(folder)
