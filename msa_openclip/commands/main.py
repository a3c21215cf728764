"""The command `msa-openclip`: the tree of its subcommands.

from msa_openclip.commands.main import main, parser
code = main(["eval", "ViT-B-32=openai", "--shards", "ucm/test-{000000..000003}.tar"])
print(parser().format_help())
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from .. import __version__
from ..shards import command_line
from ..shards.exit_codes import run_command
from . import best, card, classify, convert, demo, embed, eval, explain, features, index, search

COMMANDS = (features, eval, classify, best, card, embed, index, search, explain, demo, convert)
"""Modules of the subcommands, in the order of the help; `shards` comes last, with subcommands of its own."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code.

    0 is fine, 1 refused or failed, with one line on stderr, 2 wrong usage, 130 and 143 Ctrl-C and SIGTERM.
    """
    return run_command(parser(), arguments, refusals=(ValueError, OSError))


def parser() -> argparse.ArgumentParser:
    """All subcommands with their arguments and help; nothing heavy is imported."""
    tree = argparse.ArgumentParser(
        prog="msa-openclip",
        description="Retrieval in remote sensing images with MSA models and any other model of open_clip.",
        epilog="msa-openclip COMMAND --help says more. Models are trained by python -m open_clip_train.main.",
    )
    tree.add_argument("--version", action="version", version=f"msa_openclip {__version__}")
    commands = tree.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for module in COMMANDS:
        module.add(commands)
    shards = commands.add_parser(
        "shards",
        help="captions and images to shards; checks, reports, drawn scenes",
        description=command_line.DESCRIPTION,
    )
    command_line.add_commands(shards)
    return tree


def subcommands(tree: argparse.ArgumentParser, *words: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every subcommand that does something, as it is typed (`eval`, `shards build`), with its parser."""
    below = [action for action in tree._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield " ".join(words), tree
    for action in below:
        for name, command in action.choices.items():
            yield from subcommands(command, *words, name)
