"""Checkpoint files that a kill left half-written: open_clip writes them under their final names."""

from __future__ import annotations

import logging
import os
import zipfile
from pathlib import Path

ASIDE = ".incomplete"
_PICKLE = b"\x80"  # first byte of the format that torch wrote before 1.6, which does not show where it ends

_log = logging.getLogger(__name__)


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


def set_aside_half_written(folder: str | Path) -> list[Path]:
    """Rename half-written checkpoints of a run to NAME.pt.incomplete, so that `--resume latest` takes the one before.

    Returns:
        Their former names.
    """
    found = []
    for path in sorted(Path(folder).glob("*.pt")):
        if path.is_file() and not is_whole(path):
            try:
                os.replace(path, f"{path}{ASIDE}")
            except FileNotFoundError:  # another rank was faster
                continue
            _log.warning("%s is half-written, set aside as %s%s; resuming from the one before.", path, path.name, ASIDE)
            found.append(path)
    return found
