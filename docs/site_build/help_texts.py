"""MkDocs hook: puts the help texts of `msa-openclip` and its subcommands into reference/commands.md."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator
from typing import Any

MARKER = "<!-- help texts -->"
COLUMNS = "100"
"""Width of the help texts; argparse takes it from the environment."""
GROUPS: tuple[tuple[str, ...], ...] = ((), ("shards",))
"""Commands that have subcommands."""


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace the marker by a section for each command."""
    if MARKER not in markdown:
        return markdown
    return markdown.replace(MARKER, "\n".join(_sections()))


def _sections() -> Iterator[str]:
    for group in GROUPS:
        group_help = _help(*group)
        for name in _subcommands(group_help):
            words = (*group, name)
            yield f"## msa-openclip {' '.join(words)}\n\n```text\n{_help(*words)}```\n"


def _help(*words: str) -> str:
    """What `msa-openclip WORDS --help` prints."""
    from msa_openclip.commands.main import main

    printed = io.StringIO()
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = COLUMNS
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            main([*words, "--help"])
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    return printed.getvalue()


def _subcommands(group_help: str) -> list[str]:
    """The names that a help text lists, each at the start of a line with what it does behind it."""
    names = re.findall(r"^ {2,4}([a-z][a-z-]*)(?:  +\S|$)", group_help, flags=re.MULTILINE)
    if not names:
        raise ValueError(f"no subcommands found in the help text:\n{group_help}")
    return names
