"""`msa-openclip best`: choose each run's epoch by validation, test it once, sum up the seeds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from . import eval_options, report
from .evaluation import evaluate
from .examples import find_examples
from .loading import load
from .run_selection import METRIC, best_epoch, mean_and_sd


def main(arguments: Sequence[str] | None = None) -> int:
    """Choose, test, report."""
    parsed = _parser().parse_args(arguments)
    chosen = [best_epoch(run, parsed.metric) for run in parsed.runs]
    for best in chosen:
        print(f"{best.run}: epoch {best.epoch}, {best.metric} {best.value:.2f} on val")
    data, options = eval_options.read_set(parsed), eval_options.running(parsed)
    results = []
    for best in chosen:
        model = load(best.spec, parsed.device, parsed.precision)
        found = evaluate(model.scorer, data, model.preprocess, model.tokenizer, options)
        results.append(report.ModelResult.of(best.spec, found, 0.0, ties="expected", bootstrap=parsed.bootstrap))
        if parsed.html:
            results[-1].examples = find_examples(model, found)
    print("\n" + report.table(data, results))
    rankings = [name for name in results[0].metrics if all(name in result.metrics for result in results)]
    seeds = {name: mean_and_sd([result.metrics[name] for result in results]) for name in rankings}
    print(f"\nmean +- sd of {len(results)} runs on test")
    for name in (name for name in rankings if "_scale" not in name):
        both = [(key.replace("_", " "), *seeds[name][key]) for key in report.COLUMNS]
        print(f"  {name}: " + ", ".join(f"{key} {mean:.2f} +- {sd:.2f}" for key, mean, sd in both))
    if parsed.json:
        content = report.as_dict(data, results, parsed) | {
            "chosen": [asdict(best) for best in chosen],
            "mean_sd": seeds,
        }
        report.write_json(parsed.json, content)
    if parsed.html:
        from .report_page import page

        Path(parsed.html).write_text(page(data, results), encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="msa-openclip best",
        description="The best epoch of each run by its own validation (results.jsonl), evaluated once on test data.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder LOGS/NAME of open_clip_train.main, one per seed")
    parser.add_argument("--metric", default=METRIC, help="key of results.jsonl to choose by (default: %(default)s)")
    eval_options.add_data(parser)
    eval_options.add_running(parser)
    parser.add_argument(
        "--bootstrap", type=int, default=0, help="samples for 95 %% intervals over images, of each run (%(default)s)"
    )
    parser.add_argument("--json", help="write everything to this file")
    parser.add_argument("--html", help="write a page with plots and pictures to this file (needs matplotlib)")
    return parser
