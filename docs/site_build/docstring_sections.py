"""Griffe extension: our docstrings put no blank line before `Args:`, `Returns:` and `Raises:`; its parser wants one."""

from __future__ import annotations

import re
from typing import Any

import griffe

_SECTION = re.compile(r"\n(?=(?:Args|Returns|Yields|Raises|Attributes):\n)")


class DocstringSections(griffe.Extension):
    """Puts the blank line in before the docstring is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _SECTION.sub("\n\n", obj.docstring.value)
