"""The command `msa-openclip`: each subcommand is a module's `main`, imported only when it is asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "eval": ("msa_openclip.commands.eval", "retrieval metrics of models, side by side"),
    "classify": ("msa_openclip.commands.classify", "zero-shot scene classification"),
    "best": ("msa_openclip.commands.best", "best epoch of each run by validation, tested once; seeds as mean +- sd"),
    "card": ("msa_openclip.commands.card", "a model card for the hub from a run and its test"),
    "index": ("msa_openclip.commands.index", "images to an index on disk"),
    "search": ("msa_openclip.commands.search", "texts or pictures against an index"),
    "explain": ("msa_openclip.commands.explain", "words and places behind the score of an image and a text"),
    "demo": ("msa_openclip.commands.demo", "a web page over an index"),
    "convert": ("msa_openclip.model.convert", "a checkpoint of the paper authors' released code to MSA-ResNet50-BERT"),
    "shards": ("msa_openclip.shards.command_line", "captions and images to shards, synthetic scenes, checks"),
}
"""Subcommand -> (module with `main(arguments) -> exit code`, one line of help)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns its exit code: 0 fine, 1 refused or failed with a message, 2 wrong usage."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(usage())
        return 0 if given else 2
    if given[0] not in COMMANDS:
        print(f"msa-openclip: unknown command {given[0]!r}\n\n{usage()}", file=sys.stderr)
        return 2
    module = importlib.import_module(COMMANDS[given[0]][0])
    from ..shards.output import until_unread

    try:
        code: int = until_unread(lambda: int(module.main(given[1:]) or 0))
        return code
    except (ValueError, OSError) as error:
        print(f"msa-openclip {given[0]}: error: {error}", file=sys.stderr)
        return 1


def usage() -> str:
    """What `msa-openclip --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {line}" for name, (_, line) in COMMANDS.items()]
    return "\n".join(["usage: msa-openclip COMMAND ...", "", *lines, "", "msa-openclip COMMAND --help says more."])
