"""`msa-openclip eval`: models side by side on one set, as a table, JSON and a page."""

from __future__ import annotations

import argparse

from ..evaluation.options import RERANKINGS
from ..shards.arguments import Commands, add_choice, add_command
from .options import add_data, add_models, add_reports, add_running


def add(commands: Commands) -> None:
    """Arguments and help."""
    command = add_command(
        commands,
        "eval",
        run,
        "retrieval metrics of models, side by side",
        description="Retrieval metrics of open_clip models: recall@{1,5,10} both ways, mR, median and mean rank.",
        examples=[
            "msa-openclip eval MSA-ViT-B=epoch_9.pt ViT-B-32=openai --shards 'ucm/test-{000000..000003}.tar'",
            "msa-openclip eval ViT-B-32=RemoteCLIP-ViT-B-32.pt --captions dataset_ucm.json --images images",
        ],
    )
    add_models(command)
    add_data(command)
    text = "what was trained on; captions that stand there, whatever their case, and the others are rated apart, too"
    command.add_argument("--train-captions", metavar="FILE_OR_PATTERN", help=text)
    text = "also re-rank; all but qb-norm-bank use all test queries at once, which a search cannot"
    command.add_argument("--rerank", nargs="+", default=[], choices=RERANKINGS, help=text)
    text = "shards of training images, whose queries qb-norm-bank uses"
    command.add_argument("--bank", metavar="PATTERN", help=text)
    add_running(command)
    group = add_reports(command, bootstrap=1000)
    add_choice(group, "--ties", "equal scores", ("expected", "pessimistic"))
    group.add_argument("--scales", action="store_true", help="also print the rankings of each scale alone")


def run(parsed: argparse.Namespace) -> None:
    """Evaluate and report."""
    from ..reports import report
    from . import evaluations
    from .inputs import read_set

    data = read_set(parsed)
    results = evaluations.evaluate_all(parsed.models, data, parsed, ties=parsed.ties)
    print(report.table(data, results, scales=parsed.scales))
    evaluations.write(parsed, data, results)
