"""Files and fsspec URLs behind one small surface: read, list, and write so that a name never shows half a file."""

from __future__ import annotations

import glob
import os
import posixpath
import re
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path
from typing import IO, Any, cast

import fsspec

from ..records import ShardError

_TEMPORARY_NAME = re.compile(r"\.(.+)\.[0-9a-f]{8}\.tmp")
# What tells one version of a remote file from the next, under the names that the stores give it.
VERSION_FIELDS = ("size", "ETag", "etag", "blob_id", "md5Hash", "mtime", "LastModified", "Last-Modified", "created")
MOST_BYTES = 2 << 30
"""Nothing larger is read in one piece."""


class NotReadable(ShardError):
    """What lies there is no regular file, or larger than anything that is read in one piece."""


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


def is_file(url: str) -> bool:
    """True if `url` is a file."""
    if is_local(url):
        return os.path.isfile(local_path(url))
    fs, path = filesystem(url)
    return bool(fs.isfile(path))


def is_link(url: str) -> bool:
    """True if `url` is a symbolic link."""
    return is_local(url) and os.path.islink(local_path(url))


def overlap(first: str, second: str) -> bool:
    """True if two places are the same, by whichever names and links, or one lies inside the other."""
    pairs = product(_real_names(first), _real_names(second))
    return any(one.startswith(other) or other.startswith(one) for one, other in pairs)


def same(first: str, second: str) -> bool:
    """True if two places are the same, by whichever names and links."""
    return not _real_names(first).isdisjoint(_real_names(second))


def is_inside(url: str, folder: str) -> bool:
    """True if a path or URL names something below `folder`, going by the names: links are taken as they stand."""
    if is_local(url) != is_local(folder):
        return False
    if is_local(url):
        path, root = (os.path.abspath(local_path(name)) for name in (url, folder or "."))
    else:
        path, root = (posixpath.normpath(name) for name in (url, folder))
    return path.startswith(root.rstrip("/") + "/")


def _real_names(url: str) -> set[str]:
    """Where a place lies, ending in a slash; for a link also where the link itself lies."""
    if is_local(url):
        above, name = os.path.split(os.path.abspath(local_path(url)))
        at = os.path.join(os.path.realpath(above), name)
        return {f"{path.rstrip('/')}/" for path in (at, os.path.realpath(at))}
    fs, path = filesystem(url)
    return {f"{fs.protocol}://{path.rstrip('/')}/"}


def version(url: str) -> str:
    """What tells the content of a file, or of the files in a folder, from what it was or will be; empty if absent."""
    try:
        if is_local(url):
            found = os.stat(local_path(url))
            own = (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
            inside = [version(join(url, name)) for name in names(url)] if stat.S_ISDIR(found.st_mode) else []
            return repr((own, inside))
        fs, path = _fresh(url)
        info = fs.info(path)
        return repr([info.get(name) for name in VERSION_FIELDS])
    except Exception:  # fsspec back ends raise their own types
        return ""


def changed_ns(url: str) -> int:
    """When a local file was last changed; 0 if it is absent, or remote."""
    try:
        return os.stat(local_path(url)).st_mtime_ns if is_local(url) else 0
    except OSError:
        return 0


def size(url: str) -> int:
    """Bytes of a file."""
    if is_local(url):
        return os.path.getsize(local_path(url))
    fs, path = _fresh(url)
    return int(fs.size(path))


def read_bytes(url: str, most: int = MOST_BYTES) -> bytes:
    """All bytes of a file.

    Raises:
        NotReadable: it is no regular file, or has more than `most` bytes; that is known before anything is read.
    """
    if is_local(url):
        with open_regular(local_path(url)) as file:
            require_size(url, os.fstat(file.fileno()).st_size, most)
            return file.read()
    fs, path = filesystem(url)
    with suppress(NotImplementedError, TypeError):  # a web server need not say
        require_size(url, int(fs.size(path)), most)
    return cast(bytes, fs.cat_file(path))


def require_size(url: str, size: int, most: int) -> None:
    """Refuse what is larger than `most` bytes.

    Raises:
        NotReadable: it is.
    """
    if size > most:
        raise NotReadable(f"{url}: {size:,} bytes, more than the {most:,} that are read in one piece.")


def open_regular(path: str, buffering: int = -1) -> IO[bytes]:
    """Open a local file for reading; pipes, devices and sockets, which may never end or answer, are refused unopened.

    Raises:
        NotReadable: it is no regular file.
        OSError: it cannot be opened.
    """
    _require_regular(path, os.stat(path))
    file = open(  # noqa: SIM115 -- the caller closes it
        path, "rb", buffering=buffering, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)
    )
    try:
        _require_regular(path, os.fstat(file.fileno()))  # it may have been replaced in between
    except NotReadable:
        file.close()
        raise
    return file


def require_regular(url: str) -> None:
    """Refuse a pipe, device or socket before another library opens it and waits.

    Raises:
        NotReadable: it is one; a URL never is.
    """
    if is_local(url):
        _require_regular(local_path(url), os.stat(local_path(url)))


def _require_regular(path: str, found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(f"{path}: a folder, where a file is expected.")
    if not stat.S_ISREG(found.st_mode):
        raise NotReadable(f"{path}: not a regular file but a pipe, device or socket. Give a copy of its content.")


def open_read(url: str) -> IO[bytes]:
    """A binary file to read and seek in.

    Raises:
        NotReadable: it is no regular file.
    """
    if is_local(url):
        return open_regular(local_path(url))
    fs, path = filesystem(url)
    return cast(IO[bytes], fs.open(path, "rb"))


def listing(folder: str) -> list[str]:
    """Paths of all files below `folder`, relative to it, in sorted order.

    Links to folders are followed, but no folder is entered twice: a link to one that lies below `folder` anyway, or
    above, gives nothing, nor does a folder that does not exist.

    Raises:
        OSError: a folder cannot be read.
    """
    if is_local(folder):
        root = local_path(folder)
        return sorted(os.path.relpath(path, root).replace(os.sep, "/") for path in _walk(root))
    fs, path = _fresh(folder)
    cut = len(path.rstrip("/")) + 1
    return sorted(name[cut:] for name in fs.find(path))


def matching(pattern: str) -> list[str]:
    """Files whose whole names match a pattern, under names as the pattern writes them, in sorted order.

    `*`, `?` and `[...]` stand for no slash, `**` for any number of folders.
    """
    if is_local(pattern):
        path = local_path(pattern)
        prefix = pattern.removesuffix(path)
        return sorted(prefix + name for name in glob.glob(path, recursive=True) if not os.path.isdir(name))
    fs, path = _fresh(pattern)
    found = fs.glob(path, detail=True)
    prefix = pattern.removesuffix(path.lstrip("/"))  # the protocol, and the host where names are without it
    return sorted(prefix + name.lstrip("/") for name, info in found.items() if info["type"] != "directory")


def _walk(root: str) -> Iterator[str]:
    """Files below `root`.  Real folders come before links, so that files have the name of the place where they are."""
    entered: set[tuple[int, int]] = set()
    folders, links = [root], list[str]()
    while folders or links:
        if not folders:
            links.sort(reverse=True)
            folders.append(links.pop())
        at = folders.pop()
        try:
            found = os.stat(at)
        except FileNotFoundError:
            continue
        if (found.st_dev, found.st_ino) in entered or not stat.S_ISDIR(found.st_mode):
            continue
        entered.add((found.st_dev, found.st_ino))
        with os.scandir(at) as entries:
            for entry in entries:
                if not entry.is_dir():
                    yield entry.path
                else:
                    (links if entry.is_symlink() else folders).append(entry.path)


def names(folder: str) -> list[str]:
    """Names of the files that lie in `folder` itself, links among them; empty if it does not exist."""
    if is_local(folder):
        try:
            with os.scandir(local_path(folder)) as entries:
                return sorted(entry.name for entry in entries if not entry.is_dir(follow_symlinks=False))
        except (FileNotFoundError, NotADirectoryError):
            return []
    fs, path = _fresh(folder)
    try:
        return sorted(base_name(row["name"]) for row in fs.ls(path, detail=True) if row["type"] != "directory")
    except FileNotFoundError:
        return []


def make_folder(url: str) -> None:
    """Create a folder and its parents; nothing to do on stores without folders."""
    if is_local(url):
        folder = Path(local_path(url))
        new = [at for at in (folder, *folder.parents) if not at.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for at in new:
            _sync_folder(at.parent)
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


def remove_empty_folder(url: str) -> None:
    """Delete a folder if nothing is in it."""
    if is_local(url):
        with suppress(OSError):
            os.rmdir(local_path(url))
        return
    fs, path = _fresh(url)
    with suppress(OSError, NotImplementedError):
        if fs.exists(path) and not fs.find(path):
            fs.rm(path, recursive=True)


def target_of_temporary(name: str) -> str | None:
    """The file that `atomic_write` was writing under the temporary name `name`; None for all other names."""
    match = _TEMPORARY_NAME.fullmatch(name)
    return match.group(1) if match else None


@contextmanager
def atomic_write(url: str) -> Iterator[IO[bytes]]:
    """Open a temporary neighbour of `url`; rename it at the end, or delete it when something was raised.

    A local file is on the disk before it gets its name, and so is the name when this ends.  What is a pipe or device,
    or /dev/stdout, is written to, not replaced.
    """
    if is_local(url) and _is_no_place_for_files(local_path(url)):
        with open(local_path(url), "wb") as file:
            yield file
        return
    temporary = join(parent(url), f".{base_name(url)}.{uuid.uuid4().hex[:8]}.tmp")
    if is_local(url):
        path, final = local_path(temporary), local_path(url)
        try:
            with open(path, "xb", buffering=1 << 20) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            rename(path, final)
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


def _is_no_place_for_files(path: str) -> bool:
    """True for pipes, devices and what leads to an open file: root could rename a file over them, and break them."""
    if os.path.abspath(path).startswith(("/dev/", "/proc/")):
        return not os.path.abspath(path).startswith("/dev/shm/")
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def rename(path: str, final: str) -> None:
    """Give a local file or folder its final name, in place of what has it; both names are on the disk afterwards.

    What is in it must be there already: see `sync`.
    """
    os.replace(path, final)
    for folder in {os.path.dirname(path) or ".", os.path.dirname(final) or "."}:
        _sync_folder(folder)


def sync(path: str) -> None:
    """See to it that a local file, or a folder with all files below it, is on the disk."""
    if not os.path.isdir(path):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        return
    for at, _, files in os.walk(path):
        for name in files:
            sync(os.path.join(at, name))
        _sync_folder(at)


def _sync_folder(folder: str | Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems know no such thing
        pass
    finally:
        os.close(descriptor)


def write_bytes(url: str, data: bytes) -> None:
    """Write a whole file atomically."""
    with atomic_write(url) as file:
        file.write(data)


def write_text(url: str, text: str) -> None:
    """Write a whole file atomically, as UTF-8; what cannot be written so (of file names in other encodings) is escaped.

    In JSON the escape, `\\udcff` say, reads back as what it was.
    """
    write_bytes(url, text.encode("utf-8", "backslashreplace"))
