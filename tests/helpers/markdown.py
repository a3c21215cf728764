"""What a page of documentation tells its reader to run."""

from __future__ import annotations

import re
from collections.abc import Iterator

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def shell_lines(page: str) -> Iterator[str]:
    """The lines of indented blocks, continued ones joined, without comments behind the command."""
    block = "".join(re.findall(r"^    (.*\n)", _FENCED.sub("", page), flags=re.MULTILINE))
    for line in block.replace("\\\n", " ").splitlines():
        command = re.sub(r"(^|\s)#.*", "", line)
        if command.strip():
            yield re.sub(r"\s+", " ", command).strip()


def python_blocks(page: str) -> list[str]:
    """The fenced blocks of Python."""
    return [block for language, block in _FENCED.findall(page) if language == "python"]
