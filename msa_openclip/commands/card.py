"""`msa-openclip card`: a model card for the hub from a run and the report of its test."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..reports.model_card import OPEN, card, gather
from ..reports.run_selection import METRIC


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the card; what only the author knows is named on stderr."""
    parsed = _parser().parse_args(arguments)
    facts = gather(parsed.run, parsed.eval, parsed.metric)
    title = parsed.title or parsed.repo.rpartition("/")[2]
    text = card(facts, title=title, repository=parsed.repo, license=parsed.license)
    print(text, end="")
    places = [line.strip("- ") for line in text.splitlines() if OPEN in line]
    print("\n".join([f"{len(places)} places are left to you:", *places]), file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="msa-openclip card",
        description="A model card (README.md) for the hub: model, training, choice of the epoch, recalls and protocol.",
    )
    parser.add_argument("run", metavar="RUN", help="folder LOGS/NAME of open_clip_train.main")
    parser.add_argument(
        "--eval", required=True, metavar="JSON", help="what best --json or eval --json wrote of its test"
    )
    parser.add_argument("--metric", default=METRIC, help="key of results.jsonl that chose the epoch (%(default)s)")
    parser.add_argument("--repo", default="ORG/NAME", help="repository on the hub (%(default)s)")
    parser.add_argument("--title", help="default: the repository's name")
    parser.add_argument("--license", help="identifier of the hub, e.g. mit or cc-by-nc-4.0")
    return parser
