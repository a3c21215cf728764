"""`msa-openclip best`: choose each run's epoch by validation, test it once, sum up the seeds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict

from ..reports import report
from ..reports.run_selection import METRIC, best_epoch, mean_and_sd
from . import eval_reports
from . import options as eval_options


def main(arguments: Sequence[str] | None = None) -> int:
    """Choose, test, report."""
    parsed = _parser().parse_args(arguments)
    chosen = [best_epoch(run, parsed.metric) for run in parsed.runs]
    for best in chosen:
        print(f"{best.run}: epoch {best.epoch}, {best.metric} {best.value:.2f} on val")
    data = eval_options.read_set(parsed)
    results = eval_reports.evaluate_all([best.spec for best in chosen], data, parsed)
    print("\n" + report.table(data, results))
    rankings = [name for name in results[0].metrics if all(name in result.metrics for result in results)]
    seeds = {name: mean_and_sd([result.metrics[name] for result in results]) for name in rankings}
    print(f"\nmean +- sd of {len(results)} runs on test")
    for name in (name for name in rankings if "_scale" not in name):
        both = [(key.replace("_", " "), *seeds[name][key]) for key in report.COLUMNS]
        print(f"  {name}: " + ", ".join(f"{key} {mean:.2f} +- {sd:.2f}" for key, mean, sd in both))
    eval_reports.write(parsed, data, results, chosen=[asdict(best) for best in chosen], mean_sd=seeds)
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
    eval_reports.add_reports(parser, bootstrap=0)
    return parser
