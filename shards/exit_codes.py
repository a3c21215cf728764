"""Runs a command to its exit code: one line for a refusal, orderly interrupts."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .output import log_printably, printable, printable_lines, until_unread
from .records import ShardError


class UsageError(ValueError):
    """Arguments that do not go together; the user is shown the usage line, and the exit code is 2."""


def run_command(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None = None,
    refusals: tuple[type[Exception], ...] = (ShardError, OSError),
) -> int:
    """Parse arguments, run the command that they name (`arguments.add_command`), return its exit code.

    0 is fine, 1 refused or failed, with one line on stderr, 2 wrong usage; 130 and 143 are Ctrl-C and SIGTERM, 141 that
    whoever reads the output, `head` say, has left.

    Args:
        parser: its subcommands are made by `add_command`.
        arguments: default: those of the process.
        refusals: exceptions that are the user's to mend; all others are bugs and keep their traceback.
    """
    return until_unread(lambda: _parse_and_run(parser, arguments, refusals))


def _parse_and_run(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, refusals: tuple[type[Exception], ...]
) -> int:
    try:
        parsed = parser.parse_args(arguments)
    except SystemExit as end:  # argparse has printed the help, or what is wrong
        return int(end.code or 0)
    # What `add_command` left there goes before the options are read, which some commands write into their reports.
    log_printably()
    run, command, interrupted = (vars(parsed).pop(name) for name in ("run", "command", "interrupted"))
    try:
        with _terminable():
            return int(run(parsed) or 0)
    except BrokenPipeError:
        raise  # of the output, for `until_unread`
    except UsageError as error:
        print(f"{command.format_usage()}{command.prog}: error: {error}", file=sys.stderr)
        return 2
    except refusals as error:
        said = printable(str(error)) if isinstance(error, ShardError) else printable_lines(str(error))
        print(f"{command.prog}: error: {said}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print(interrupted, file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(interrupt, _Terminated) else signal.SIGINT)


class _Terminated(KeyboardInterrupt):
    """SIGTERM came, of a scheduler say."""


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the command as orderly as Ctrl-C does; only the main thread can see to that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(*_: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
