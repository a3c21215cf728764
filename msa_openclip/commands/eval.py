"""`msa-openclip eval`: models side by side on one set, as a table, JSON and a page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..reports import report
from . import eval_reports
from . import options as eval_options

EXAMPLES = """examples:
  msa-openclip eval MSA-ViT-B=logs/ucm/checkpoints/epoch_9.pt ViT-B-32=openai --shards 'ucm/test-{000..003}.tar'
  msa-openclip eval ViT-B-32=RemoteCLIP-ViT-B-32.pt --captions dataset_ucm.json --images images --html ucm.html
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate and report."""
    parsed = _parser().parse_args(arguments)
    data = eval_options.read_set(parsed)
    results = eval_reports.evaluate_all(parsed.models, data, parsed, ties=parsed.ties)
    print(report.table(data, results, scales=parsed.scales))
    eval_reports.write(parsed, data, results)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="msa-openclip eval",
        description="Retrieval metrics of open_clip models: recall@{1,5,10} both ways, mR, median and mean rank.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    eval_options.add_models(parser)
    eval_options.add_data(parser)
    eval_options.add_running(parser)
    group = eval_reports.add_reports(parser, bootstrap=1000)
    group.add_argument(
        "--ties", choices=("expected", "pessimistic"), default="expected", help="equal scores (default: %(default)s)"
    )
    group.add_argument("--scales", action="store_true", help="also print the rankings of each scale alone")
    return parser
