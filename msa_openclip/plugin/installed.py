"""Chooses the adapter for the open_clip that is installed: once, by what the host is and not by its number."""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType

from .host import NEEDS, Host, note_lacking


@functools.lru_cache(maxsize=1)
def installed() -> Host:
    """The adapter of the open_clip that is installed."""
    if importlib.util.find_spec("open_clip.task") is not None:
        from .host_4 import OpenClip4

        return OpenClip4()
    from .host_3 import OpenClip3

    return OpenClip3()


def lacks(module: ModuleType) -> list[str]:
    """What a module of open_clip lacks of what the plugin builds on in this line."""
    name = module.__name__
    return note_lacking(module, (*NEEDS.get(name, ()), *installed().needs.get(name, ())))
