"""Small files that may be anybody's: regular ones only, of bounded size; JSON names its file when it is wrong.

Opening a pipe waits for ever, a device never ends, and a crafted JSON can exhaust the stack: all three are refused
here, so that whoever reads a configuration, a report or an index through this file need not think of them.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

LIMIT_BYTES = 64 << 20
LARGEST_CONFIG = 1 << 20
"""Bytes of a model's configuration."""


class FileProblem(ValueError):
    """A file cannot be used; the message names it and the reason."""


def require_regular(path: str | Path) -> os.stat_result:
    """The status of a regular file.

    Raises:
        FileNotFoundError: it does not exist.
        FileProblem: it is a folder, a pipe, a socket or a device.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise FileProblem(f"{path}: not a regular file (a folder, pipe or device); nothing is read from it.")
    return status


def read_text(path: str | Path, limit_bytes: int = LIMIT_BYTES) -> str:
    """The text of a small regular file, UTF-8 whatever the locale says.

    Raises:
        FileNotFoundError: it does not exist.
        FileProblem: it is no regular file, larger than `limit_bytes`, or not UTF-8.
    """
    size = require_regular(path).st_size
    if size > limit_bytes:
        raise FileProblem(f"{path}: {size:,} bytes, and no more than {limit_bytes:,} are read; is it the right file?")
    try:
        return Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileProblem(f"{path}: {error}; save the file as UTF-8.") from error


def parse_json(text: str | bytes, where: str) -> Any:
    """Plain data from JSON.

    Args:
        text: the JSON.
        where: what a complaint calls it: the file, and the place in it.
    Raises:
        FileProblem: it is no JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise FileProblem(f"{where}: nested too deeply to be read.") from error
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, numbers of too many digits
        raise FileProblem(f"{where}: not JSON ({error}).") from error


def read_json(path: str | Path, limit_bytes: int = LIMIT_BYTES) -> Any:
    """`parse_json` of a small regular file."""
    return parse_json(read_text(path, limit_bytes), str(path))
