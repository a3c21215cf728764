"""Checkpoint files that a kill or a full disk left half-written."""

from __future__ import annotations

import zipfile
from pathlib import Path

_PICKLE = b"\x80"  # first byte of the format that torch wrote before 1.6, which does not show where it ends


def is_whole(path: str | Path) -> bool:
    """True if a checkpoint is there to its end: the directory of torch's zip files is written last."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except FileNotFoundError:
        return False
    except (zipfile.BadZipFile, OSError):
        with open(path, "rb") as file:
            return file.read(1) == _PICKLE
