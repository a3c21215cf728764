"""What `eval` and `best` share: models evaluated one after the other, and the reports that are written of them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..evaluation.eval_set import EvalSet
from ..evaluation.evaluate import evaluate
from ..evaluation.loading import load
from ..evaluation.metrics import Ties
from ..reports import report
from ..reports.examples import find_examples
from . import options as eval_options


def add_reports(parser: argparse.ArgumentParser, *, bootstrap: int) -> Any:
    """--bootstrap with its default, --json and --html; returns their group, for what a command adds."""
    group = parser.add_argument_group("report")
    group.add_argument(
        "--bootstrap",
        type=int,
        default=bootstrap,
        help="samples for 95 %% intervals over images, 0 for none (default: %(default)s)",
    )
    group.add_argument("--json", help="write everything to this file")
    group.add_argument("--html", help="write a page with plots and pictures to this file (needs matplotlib)")
    return group


def evaluate_all(
    specs: Sequence[str], data: EvalSet, parsed: argparse.Namespace, *, ties: Ties = "expected"
) -> list[report.ModelResult]:
    """Load and evaluate each model as the options say; with examples, if a page is wanted."""
    options = eval_options.running(parsed)
    results = []
    for spec in specs:
        model = load(spec, parsed.device, parsed.precision)
        start = time.perf_counter()
        found = evaluate(model.scorer, data, model.preprocess, model.tokenizer, options)
        seconds = time.perf_counter() - start
        results.append(report.ModelResult.of(spec, found, seconds, ties=ties, bootstrap=parsed.bootstrap))
        if parsed.html:
            results[-1].examples = find_examples(model, found)
    return results


def write(parsed: argparse.Namespace, data: EvalSet, results: Sequence[report.ModelResult], **more: Any) -> None:
    """Write the files that are asked for; `more` goes into the JSON."""
    if parsed.json:
        report.write_json(parsed.json, report.as_dict(data, results, parsed) | more)
    if parsed.html:
        from ..reports.page import page

        Path(parsed.html).write_text(page(data, results), encoding="utf-8")
