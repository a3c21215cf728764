"""MkDocs hook: puts the help texts of `msa-openclip` and its subcommands into reference/commands.md."""

from __future__ import annotations

import os
from typing import Any
from unittest.mock import patch

from msa_openclip.commands.main import parser, subcommands

MARKER = "<!-- help texts -->"
COLUMNS = {"COLUMNS": "100"}
"""Width of the help texts; argparse takes it from the environment."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marker by a section for each command."""
    if MARKER not in markdown:
        return markdown
    with patch.dict(os.environ, COLUMNS):
        sections = [
            f"## msa-openclip {name}\n\n```text\n{command.format_help()}```\n"
            for name, command in subcommands(parser())
        ]
    return markdown.replace(MARKER, "\n".join(sections))
