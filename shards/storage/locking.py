"""One writer for a folder: a lock that the operating system drops with the process that holds it, however it ends."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ..records import ShardError
from . import store

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".msa_openclip.lock"
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
_log = logging.getLogger(__name__)


class BeingWritten(ShardError):
    """Another process writes into the folder at this moment."""


@contextmanager
def one_writer(folder: str) -> Iterator[None]:
    """Be the only one to write into a folder for as long as this lasts; it must exist.

        with one_writer("shards/ucm"):
            ...

    The lock is `flock` on a file in the folder, LOCK: a killed process leaves the file, but not the lock, and the next
    one takes it.
    Processes forked while it is held share it, so it also lasts until they have ended.  On stores behind URLs and file
    systems that know no locks nothing is locked; for the latter a warning says so.

    Raises:
        BeingWritten: another process, or another thread of this one, holds it; the message names the process.
    """
    if not store.is_local(folder) or fcntl is None:
        yield
        return
    path = os.path.join(store.local_path(folder), LOCK)
    held = _acquire(path, folder)
    try:
        yield
    finally:
        if held is not None:
            with suppress(FileNotFoundError):
                os.unlink(path)  # before it is let go: whoever gets it now sees that it is not the one in the folder
            fcntl.flock(held, fcntl.LOCK_UN)
            os.close(held)


def _acquire(path: str, folder: str) -> int | None:
    """A descriptor that holds the lock; None where the file system has no locks."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, descriptor):
                with suppress(OSError):  # the disk may be full
                    os.truncate(descriptor, 0)
                    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return descriptor
        except BlockingIOError as error:
            who = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise BeingWritten(
                f"{folder}: {who} is writing here. Wait until it has ended, or choose another folder."
            ) from error
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _NO_LOCKS:
                raise
            _log.warning("%s: its file system has no locks (%s); see to it that nobody else writes here.", path, error)
            return None
        os.close(descriptor)  # its last holder has just removed it


def _is_at(path: str, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
