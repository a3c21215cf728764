"""Checkpoint files that a kill left half-written: open_clip writes them under their final names."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from ..data.checkpoint_files import is_whole

ASIDE = ".incomplete"

_log = logging.getLogger(__name__)


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
