"""Printing to somebody who may stop reading, and what others wrote."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import unicodedata
from collections.abc import Callable

_JOINERS = "\u200c\u200d"
"""Invisible, but part of Persian, Indic scripts and emoji."""


def printable(text: str) -> str:
    """Text of anybody's, harmless on a terminal: control characters and lone surrogates as escapes, `\\x1b` for one.

    A caption could otherwise clear the screen, forge the lines around it or turn them from right to left.
    """
    return "".join(c if _is_harmless(c) else c.encode("unicode_escape").decode("ascii") for c in text)


def printable_lines(text: str) -> str:
    """`printable` of each line of a text whose own line breaks are ours."""
    return "\n".join(map(printable, text.split("\n")))


class PrintableFormatter(logging.Formatter):
    """Log records name files, samples and captions of anybody's: `printable_lines` of them."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        return printable_lines(super().format(record))


def log_printably() -> None:
    """Let this process's log, unless somebody has set one up, print nothing that acts on a terminal."""
    root = logging.getLogger()
    if not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(PrintableFormatter("%(levelname)s:%(name)s:%(message)s"))
        root.addHandler(handler)


def _is_harmless(character: str) -> bool:
    kind = unicodedata.category(character)
    return (kind[0] != "C" and kind not in ("Zl", "Zp")) or character in _JOINERS


def until_unread(command: Callable[[], int]) -> int:
    """The exit code of a command that prints; SIGPIPE's, and no complaint, where its reader, `head` say, left early."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for names that are not UTF-8, and terminals that are not
    try:
        code = command()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return 128 + signal.SIGPIPE
