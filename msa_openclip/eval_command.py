"""`msa-openclip eval`: models side by side on one set, as a table, JSON and a page."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from . import eval_options, report
from .evaluation import evaluate
from .examples import find_examples
from .loading import load

EXAMPLES = """examples:
  msa-openclip eval MSA-ViT-B=logs/ucm/checkpoints/epoch_9.pt ViT-B-32=openai --shards 'ucm/test-{000..003}.tar'
  msa-openclip eval ViT-B-32=RemoteCLIP-ViT-B-32.pt --captions dataset_ucm.json --images images --html ucm.html
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate and report."""
    parsed = _parser().parse_args(arguments)
    data = eval_options.read_set(parsed)
    options = eval_options.running(parsed)
    results = []
    for spec in parsed.models:
        model = load(spec, parsed.device, parsed.precision)
        start = time.perf_counter()
        evaluation = evaluate(model.scorer, data, model.preprocess, model.tokenizer, options)
        seconds = time.perf_counter() - start
        results.append(report.ModelResult.of(spec, evaluation, seconds, ties=parsed.ties, bootstrap=parsed.bootstrap))
        if parsed.html:
            results[-1].examples = find_examples(model, evaluation)
    print(report.table(data, results, scales=parsed.scales))
    if parsed.json:
        report.write_json(parsed.json, report.as_dict(data, results, parsed))
    if parsed.html:
        from .report_page import page

        Path(parsed.html).write_text(page(data, results), encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="msa-openclip eval",
        description="Retrieval metrics of open_clip models: recall@{1,5,10} both ways, mR, median and mean rank.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="NAME=CHECKPOINT, NAME=TAG, hf-hub:..., local-dir:..."
    )
    eval_options.add_data(parser)
    eval_options.add_running(parser)
    group = parser.add_argument_group("report")
    group.add_argument(
        "--ties", choices=("expected", "pessimistic"), default="expected", help="equal scores (default: %(default)s)"
    )
    group.add_argument(
        "--bootstrap", type=int, default=1000, help="samples for 95 %% intervals over images, 0 for none (%(default)s)"
    )
    group.add_argument("--scales", action="store_true", help="also print the rankings of each scale alone")
    group.add_argument("--json", help="write everything to this file")
    group.add_argument("--html", help="write a page with plots and pictures to this file (needs matplotlib)")
    return parser
