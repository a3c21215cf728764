"""`msa-openclip card`: a model card for the hub from a run and the report of its test."""

from __future__ import annotations

import argparse
import sys

from ..shards.arguments import Commands, add_command
from ..shards.output import printable_lines
from .options import add_metric


def add(commands: Commands) -> None:
    """Arguments and help."""
    example = "msa-openclip card logs/NAME --eval after.json --repo me/msa-rsitmd --license mit > README.md"
    text = "a model card for the hub from a run and its test"
    command = add_command(commands, "card", run, text, examples=[example])
    command.add_argument("run_folder", metavar="RUN", help="folder LOGS/NAME of open_clip_train.main")
    text = "what best --json or eval --json wrote of its test"
    command.add_argument("--eval", required=True, metavar="FILE", help=text)
    add_metric(command)
    command.add_argument("--repo", default="ORG/NAME", help="repository on the hub (default: %(default)s)")
    command.add_argument("--title", help="of the card (default: the repository's name)")
    command.add_argument("--license", metavar="ID", help="identifier of the hub, e.g. mit or cc-by-nc-4.0")


def run(parsed: argparse.Namespace) -> None:
    """Print the card; what only the author knows is named on stderr."""
    from ..reports.model_card import OPEN, card, gather

    facts = gather(parsed.run_folder, parsed.eval, parsed.metric)
    title = parsed.title or parsed.repo.rpartition("/")[2]
    text = card(facts, title=title, repository=parsed.repo, license=parsed.license)
    print(printable_lines(text), end="")
    blanks = [line.strip("- ") for line in text.splitlines() if OPEN in line]
    print(printable_lines("\n".join([f"{len(blanks)} places are left to you:", *blanks])), file=sys.stderr)
