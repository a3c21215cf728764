"""Printing to somebody who may stop reading."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable


def until_unread(command: Callable[[], int]) -> int:
    """The exit code of a command that prints; SIGPIPE's, and no complaint, where its reader, `head` say, left early."""
    try:
        code = command()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return 128 + signal.SIGPIPE
