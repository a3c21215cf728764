"""Arguments of commands: one form for every subcommand, numbers with bounds, flags from option dataclasses."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, get_args, get_origin, get_type_hints

from .exit_codes import UsageError
from .records import ShardError

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""Where subcommands are added, as `add_subparsers` returns it."""


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    help: str,
    *,
    description: str | None = None,
    examples: Sequence[str] = (),
    resumes: bool = False,
) -> argparse.ArgumentParser:
    """A subcommand for `exit_codes.run_command`.

    Args:
        commands: what it is added to.
        run: does the work; imports what is heavy itself, so that help and refusals come at once.
        help: one line for the list of commands.
        description: what its own help says, already in lines (default: `help`).
        examples: command lines for the end of its help.
        resumes: after an interruption the same command goes on where it stopped.
    """
    command = commands.add_parser(
        name,
        help=help,
        description=description or f"{help[0].upper()}{help[1:]}.",
        epilog="\n  ".join(["examples:", *examples]) if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    interrupted = "interrupted; the same command goes on from here" if resumes else "interrupted"
    command.set_defaults(run=run, command=command, interrupted=interrupted)
    return command


def add_progress(group: argparse._ActionsContainer) -> None:
    """--progress and --quiet; bars go to stderr, by default where that is a terminal."""
    group.add_argument(
        "--progress",
        action="store_true",
        default=sys.stderr.isatty(),
        help="progress bars on stderr (default: if it is a terminal)",
    )
    group.add_argument("--quiet", action="store_false", dest="progress", help="no progress bars")


MOST_WORKERS = 1_024
"""Processes or threads at once: more than any machine has cores for."""


def add_number(
    group: argparse._ActionsContainer, flag: str, help: str, *, default: int, least: int = 1, most: int | None = None
) -> None:
    """A flag for a whole number within bounds."""
    kind = whole_number(least, most)
    group.add_argument(flag, type=kind, default=default, metavar="N", help=f"{help} (default: %(default)s)")


def add_choice(group: argparse._ActionsContainer, flag: str, help: str, choices: Sequence[str]) -> None:
    """A flag for one of several words, of which the first is the default."""
    group.add_argument(flag, choices=choices, default=choices[0], help=f"{help} (default: %(default)s)")


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """A type of argument: whole numbers within bounds."""
    allowed = f"of at least {least}" if most is None else f"from {least} to {most}"

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {allowed}")
        return value

    return number


def add_options(command: argparse.ArgumentParser, options: type, title: str) -> None:
    """A flag for each field of an option dataclass that has a help text."""
    group = command.add_argument_group(title)
    hints = get_type_hints(options)
    for field in dataclasses.fields(options):
        if "help" not in field.metadata:
            continue
        flag = "--" + field.name.replace("_", "-")
        kind, default = hints[field.name], field.default
        help_text = field.metadata["help"].replace("%", "%%")
        if kind is bool:
            group.add_argument(flag, action="store_true", help=help_text)
            continue
        if get_origin(kind) is tuple:
            separator = field.metadata.get("separator", ",")
            group.add_argument(flag, type=_splitter(separator), default=default, metavar="LIST", help=help_text)
            continue
        if default not in (None, ""):
            help_text += " (default: %(default)s)"
        extra = {"choices": field.metadata["choices"]} if "choices" in field.metadata else {"metavar": _metavar(kind)}
        group.add_argument(flag, type=_scalar(kind), default=default, help=help_text, **extra)


def option_values(parsed: argparse.Namespace, options: type, **more: Any) -> Any:
    """The option dataclass that the flags of `add_options` describe; `more` are its other fields.

    Raises:
        UsageError: a value is out of bounds, or values do not go together.
    """
    names = [field.name for field in dataclasses.fields(options) if "help" in field.metadata]
    try:
        return options(**{name: getattr(parsed, name) for name in names}, **more)
    except ShardError as error:
        raise UsageError(str(error)) from error


def _scalar(kind: Any) -> Any:
    if get_origin(kind) is types.UnionType:
        kind = next(part for part in get_args(kind) if part is not type(None))
    return kind


def _metavar(kind: Any) -> str:
    return {int: "N", float: "X", str: "TEXT"}[_scalar(kind)]


def _splitter(separator: str) -> Callable[[str], tuple[str, ...]]:
    return lambda text: tuple(part.strip() for part in text.split(separator) if part.strip())
