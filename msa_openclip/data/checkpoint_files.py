"""Checkpoint files that a kill or a full disk left half-written."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

_PICKLE = b"\x80"  # first byte of the format that torch wrote before 1.6, which does not show where it ends


def is_whole(path: str | Path) -> bool:
    """True if a checkpoint is there to its end: torch writes the directory of its zip files last; it can be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except FileNotFoundError:
        return False
    # Of a damaged directory also versions that zipfile does not know, and names and fields that it cannot decode.
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError, struct.error):
        with open(path, "rb") as file:
            return file.read(1) == _PICKLE
