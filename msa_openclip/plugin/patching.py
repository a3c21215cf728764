"""Replaces a function of open_clip wherever it was imported, or runs a copy of it with one other global."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any


def replace(module: ModuleType, name: str, replacement: Callable[..., Any]) -> None:
    """Replace a function in its module and wherever it has been imported from there already."""
    original = getattr(module, name)
    setattr(module, name, replacement)
    for other_name, other in list(sys.modules.items()):
        if other_name.startswith("open_clip") and vars(other).get(name) is original:
            setattr(other, name, replacement)


def with_global(function: FunctionType, name: str, value: object) -> Callable[..., Any]:
    """A copy of `function` whose global `name` is `value`; the original is unchanged."""
    code, defaults, closure = function.__code__, function.__defaults__, function.__closure__
    copy = FunctionType(code, {**function.__globals__, name: value}, function.__name__, defaults, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
