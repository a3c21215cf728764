"""Files and fsspec URLs behind one small surface: read, list, and write so that a name never shows half a file."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

import fsspec

from ..records import ShardError

TEMPORARY = ".tmp"


def is_local(url: str) -> bool:
    """True for a plain path or file:// URL."""
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> str:
    """The path of a local URL."""
    return url.removeprefix("file://")


def join(folder: str, name: str) -> str:
    """`folder/name` for paths and URLs."""
    if name.startswith("/") or "://" in name:
        return name
    return f"{folder.rstrip('/')}/{name}" if folder else name


def parent(url: str) -> str:
    """The folder that holds `url`."""
    return url.rsplit("/", 1)[0] if "/" in url else "."


def base_name(url: str) -> str:
    """The last part of `url`."""
    return url.rstrip("/").rsplit("/", 1)[-1]


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for `url`, and the path inside it."""
    try:
        return cast(tuple[Any, str], fsspec.core.url_to_fs(url))
    except (ImportError, ValueError) as error:
        raise ShardError(f"{url}: cannot be opened ({error}).") from error


def _fresh(url: str) -> tuple[Any, str]:
    """`filesystem` without cached listings: other processes write here too."""
    fs, path = filesystem(url)
    fs.invalidate_cache()
    return fs, path


def exists(url: str) -> bool:
    """True if `url` is a file or folder."""
    if is_local(url):
        return os.path.exists(local_path(url))
    fs, path = _fresh(url)
    return bool(fs.exists(path))


def is_folder(url: str) -> bool:
    """True if `url` is a folder."""
    if is_local(url):
        return os.path.isdir(local_path(url))
    fs, path = filesystem(url)
    return bool(fs.isdir(path))


def size(url: str) -> int:
    """Bytes of a file."""
    if is_local(url):
        return os.path.getsize(local_path(url))
    fs, path = _fresh(url)
    return int(fs.size(path))


def read_bytes(url: str) -> bytes:
    """All bytes of a file."""
    if is_local(url):
        with open(local_path(url), "rb") as file:
            return file.read()
    fs, path = filesystem(url)
    return cast(bytes, fs.cat_file(path))


def open_read(url: str) -> IO[bytes]:
    """A binary file to read and seek in."""
    if is_local(url):
        return open(local_path(url), "rb")
    fs, path = filesystem(url)
    return cast(IO[bytes], fs.open(path, "rb"))


def listing(folder: str) -> list[str]:
    """Paths of all files below `folder`, relative to it, in sorted order."""
    if is_local(folder):
        root = local_path(folder)
        found = (os.path.join(at, name) for at, _, names in os.walk(root, followlinks=True) for name in names)
        return sorted(os.path.relpath(path, root).replace(os.sep, "/") for path in found)
    fs, path = _fresh(folder)
    cut = len(path.rstrip("/")) + 1
    return sorted(name[cut:] for name in fs.find(path))


def make_folder(url: str) -> None:
    """Create a folder and its parents; nothing to do on stores without folders."""
    if is_local(url):
        Path(local_path(url)).mkdir(parents=True, exist_ok=True)
        return
    fs, path = filesystem(url)
    fs.makedirs(path, exist_ok=True)


def remove(url: str) -> None:
    """Delete a file if it is there."""
    with suppress(FileNotFoundError):
        if is_local(url):
            os.remove(local_path(url))
        else:
            fs, path = filesystem(url)
            fs.rm_file(path)


def remove_folder(url: str) -> None:
    """Delete a folder with everything in it, if it is there."""
    fs, path = filesystem(url)
    if fs.exists(path):
        fs.rm(path, recursive=True)


@contextmanager
def atomic_write(url: str) -> Iterator[IO[bytes]]:
    """Open a temporary neighbour of `url`; rename it at the end, or delete it when something was raised."""
    temporary = join(parent(url), f".{base_name(url)}.{uuid.uuid4().hex[:8]}{TEMPORARY}")
    if is_local(url):
        path, final = local_path(temporary), local_path(url)
        try:
            with open(path, "wb", buffering=1 << 20) as file:
                yield file
            os.replace(path, final)
        except BaseException:
            remove(temporary)
            raise
        return
    fs, path = filesystem(temporary)
    try:
        with fs.open(path, "wb") as file:
            yield file
        fs.mv(path, filesystem(url)[1])
    except BaseException:
        with suppress(OSError):
            remove(temporary)
        raise


def write_bytes(url: str, data: bytes) -> None:
    """Write a whole file atomically."""
    with atomic_write(url) as file:
        file.write(data)
