"""Read shards wherever they lie: local files, fsspec URLs, `pipe:` commands; with retries and an optional local cache.

Shards are read forwards only, which every store can do, so that a broken connection is taken up again where it broke.
Single images of a shard are read where they lie, from the cached copy if there is one.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import logging
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from ..shards.records import Location, ShardError
from ..shards.storage import sources, store

CACHE_VARIABLE = "MSA_OPENCLIP_SHARD_CACHE"
"""Environment variable: a local folder that keeps remote shards; any number of workers and ranks may share it."""
RETRIES_VARIABLE = "MSA_OPENCLIP_RETRIES"
"""Environment variable: how often a failed remote access is tried again (default 5; waits 0.5, 1, 2, ... seconds)."""

BLOCK_BYTES = 8 << 20
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 60.0
# Another attempt cannot help: no such file, no permission, no driver for this kind of URL.
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ShardError)

_log = logging.getLogger(__name__)
_jitter = random.SystemRandom()  # leaves the random numbers of image augmentation alone
T = TypeVar("T")


class StreamError(OSError):
    """A file cannot be read; the message names its URL and what to do."""


def is_absent(error: StreamError) -> bool:
    """Whether the place itself is at fault: nothing is there.  Everything else may be the store, and pass."""
    return isinstance(error.__cause__, (FileNotFoundError, NotADirectoryError))


def open_shard(url: str, *, fill_cache: bool = True) -> IO[bytes]:
    """Open a shard for reading forwards; local files can seek, too.

    Args:
        url: a path, an fsspec URL (s3://, gs://, hf://, http://, memory://, ...) or `pipe:COMMAND`.
        fill_cache: put remote files into the cache folder; False only looks whether they are there.
    Raises:
        StreamError: it is absent, forbidden, or fails more often than RETRIES_VARIABLE allows.
    """
    if url.startswith("pipe:"):
        from webdataset import gopen  # brings torch along, which nothing else here needs

        return cast("IO[bytes]", gopen(url, "rb"))
    if not store.is_local(url):
        url_or_copy = _cached(url, Path(os.environ[CACHE_VARIABLE]), fill_cache) if _has_cache() else url
        if not store.is_local(url_or_copy):
            return cast("IO[bytes]", RemoteFile(url))
        url = url_or_copy
    return retrying(url, lambda: store.open_regular(store.local_path(url), buffering=1 << 20))


def read_if_there(url: str) -> bytes | None:
    """All bytes of a small file; None if it does not exist, or may not be seen, which stores use to say the same."""
    try:
        return retrying(url, lambda: store.read_bytes(url))
    except StreamError as error:
        if isinstance(error.__cause__, (FileNotFoundError, PermissionError, NotADirectoryError)):
            return None
        raise


def version_of(url: str) -> str:
    """What tells this version of a remote file from the next, without reading it.

    Raises:
        StreamError: the store cannot be asked.
    """
    return _version(url, _info(url))


def content_mark(url: str) -> str:
    """What tells the content of a shard from any other: a hash of its bytes; of a remote one what its store says of it.

    Empty for `pipe:` commands, whose output cannot be known without running them.

    Raises:
        StreamError: it is absent, forbidden, or fails more often than RETRIES_VARIABLE allows.
    """
    if url.startswith("pipe:"):
        return ""
    found = hashlib.blake2b(digest_size=16)
    if not store.is_local(url):
        found.update(version_of(url).encode())
        return found.hexdigest()
    with open_shard(url) as file:
        while block := file.read(BLOCK_BYTES):
            found.update(block)
    return found.hexdigest()


def _info(url: str) -> dict[str, Any]:
    def find() -> dict[str, Any]:
        filesystem, path = store.filesystem(url)
        return cast("dict[str, Any]", filesystem.info(path))

    return retrying(url, find)


def _version(url: str, info: dict[str, Any]) -> str:
    if store.is_local(url):  # without the time of other rights, under any name
        return repr([os.path.abspath(store.local_path(url)), info.get("size"), info.get("mtime")])
    return repr([url, *(info.get(name) for name in store.VERSION_FIELDS)])


def read_location(location: Location) -> bytes:
    """The bytes of one image, wherever it lies; those of a remote shard from its cached copy, where there is one.

    Raises:
        StreamError: the place is absent, forbidden, or fails more often than RETRIES_VARIABLE allows.
    """
    if location.offset is not None and _has_cache() and not store.is_local(location.url):
        location = replace(location, url=_copy_if_there(location.url, os.environ[CACHE_VARIABLE]))
    if store.is_local(location.url):
        return sources.read_location(location)
    return retrying(location.url, lambda: sources.read_location(location))


class RemoteFile:
    """An fsspec file read forwards; a failed read opens it again at the place that was reached."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._position = 0
        self._block_bytes = BLOCK_BYTES
        self._file: Any = None
        retrying(url, self._open)

    def read(self, size: int = -1) -> bytes:
        """The next `size` bytes, fewer only at the end.

        Raises:
            StreamError: the store failed too often.
        """
        data = retrying(self._url, lambda: self._read(size))
        self._position += len(data)
        return data

    def close(self) -> None:
        """Close the connection."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> RemoteFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> None:
        filesystem, path = store.filesystem(self._url)
        self._file = filesystem.open(path, "rb", block_size=self._block_bytes)
        if not self._position:
            return
        try:
            self._file.seek(self._position)
        except ValueError:  # a stream, see below: read up to the place once more
            left = self._position
            while left and (passed := len(self._file.read(min(left, BLOCK_BYTES)))):
                left -= passed

    def _read(self, size: int) -> bytes:
        if self._file is None:
            self._open()
        try:
            try:
                return cast(bytes, self._file.read(size))
            except ValueError:  # fsspec finds out that a web server knows no ranges: one stream from 0 in their place
                self._block_bytes = 0
                self._open()
                return cast(bytes, self._file.read(size))
        except Exception:
            self._file = None  # its connection and buffer are in no known state
            raise


def retrying(url: str, action: Callable[[], T]) -> T:
    """The result of `action`, tried again with growing waits.

    Raises:
        StreamError: from the last failure, or at once where another attempt cannot help.
    """
    retries = int(os.environ.get(RETRIES_VARIABLE, "5"))
    for attempt in range(retries + 1):
        try:
            return action()
        except Exception as error:
            failure = _uncovered(error)
            if isinstance(failure, _FINAL):
                why = str(failure) if isinstance(failure, ShardError) else f"{url}: {type(failure).__name__}."
                raise StreamError(f"{why} Check the name, the braces and the access rights.") from failure
            if attempt == retries:
                raise StreamError(
                    f"{url}: failed {attempt + 1} times, last with {type(failure).__name__}: {failure}. "
                    f"Check the store and the network; {RETRIES_VARIABLE} sets how often it is tried again."
                ) from failure
            wait_s = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**attempt) * _jitter.uniform(0.5, 1.0)
            _log.warning("%s: %s: %s; trying again in %.1f s.", url, type(failure).__name__, failure, wait_s)
            time.sleep(wait_s)
    raise ValueError(f"{RETRIES_VARIABLE}: {retries} is not a number of retries; give 0 or more.")


def _uncovered(error: Exception) -> BaseException:
    """What fsspec covers up where it makes every failure of a web server a FileNotFoundError; else the error itself."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or cause is None:
        return error
    status = getattr(cause, "status", 500)  # no status: no answer
    passing = type(cause).__module__.startswith("aiohttp") and not 400 <= status < 500
    return cause if passing or isinstance(cause, TimeoutError) else error


def _has_cache() -> bool:
    return bool(os.environ.get(CACHE_VARIABLE))


@functools.cache
def _copy_if_there(url: str, folder: str) -> str:
    """As `_cached`, but looked up once: asking the store anew for each image of a shard would be slow."""
    return _cached(url, Path(folder), fill=False)


def _cached(url: str, folder: Path, fill: bool) -> str:
    """Where a copy of this version of the file lies; `url` itself if there is none and none is made.

    No locks: whoever misses a copy makes one under a temporary name and renames it, so that a name shows whole files
    only.  Two who miss it at once both download it and the later takes the place of the earlier, equal one.
    """

    info = _info(url)
    version = _version(url, info)
    copy = folder / f"{hashlib.sha256(version.encode()).hexdigest()[:16]}-{store.base_name(url)}"
    if copy.exists():
        return str(copy)
    if not fill:
        return url
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with store.atomic_write(str(copy)) as target, RemoteFile(url) as source:
            shutil.copyfileobj(cast("IO[bytes]", source), target, BLOCK_BYTES)
            if info.get("size") not in (None, target.tell()):
                raise StreamError(f"{url}: ended after {target.tell():,} of {info['size']:,} bytes.")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise
        raise StreamError(
            f"{folder}: no copy of {url} can be kept here ({error}). "
            f"Make room, or set {CACHE_VARIABLE} to another folder or to nothing."
        ) from error
    return str(copy)
