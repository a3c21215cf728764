"""`msa-openclip best`: choose each run's epoch by validation, test it once, sum up the seeds."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from ..reports.run_selection import best_epoch, mean_and_sd, require_whole
from ..shards.arguments import Commands, add_command
from .options import add_data, add_metric, add_reports, add_running


def add(commands: Commands) -> None:
    """Arguments and help."""
    example = "msa-openclip best logs/seed0 logs/seed1 logs/seed2 --shards 'ucm/test-{000000..000003}.tar'"
    text = "best epoch of each run by its validation, tested once; seeds as mean +- sd"
    command = add_command(commands, "best", run, text, examples=[example])
    text = "folder LOGS/NAME of open_clip_train.main, one for each seed"
    command.add_argument("runs", nargs="+", metavar="RUN", help=text)
    add_metric(command)
    add_data(command)
    add_running(command)
    add_reports(command, bootstrap=0)


def run(parsed: argparse.Namespace) -> None:
    """Choose, test, report."""
    # Before torch is imported: a run that cannot be chosen from is refused at once.
    chosen = [best_epoch(folder, parsed.metric) for folder in parsed.runs]
    for best in chosen:
        require_whole(best)
    for best in chosen:
        print(f"{best.run}: epoch {best.epoch}, {best.metric} {best.value:.2f} on val", flush=True)

    from ..reports import report
    from . import evaluations
    from .inputs import read_set

    data = read_set(parsed)
    results = evaluations.evaluate_all([best.spec for best in chosen], data, parsed)
    print("\n" + report.table(data, results))
    # Mean and deviation over the seeds, of the rankings that all of them have.
    rankings = [name for name in results[0].metrics if all(name in result.metrics for result in results)]
    seeds = {name: mean_and_sd([result.metrics[name] for result in results]) for name in rankings}
    print(f"\nmean +- sd of {len(results)} runs on test")
    for name in (name for name in rankings if "_scale" not in name):
        both = [(key.replace("_", " "), *seeds[name][key]) for key in report.COLUMNS]
        print(f"  {name}: " + ", ".join(f"{key} {mean:.2f} +- {sd:.2f}" for key, mean, sd in both))
    evaluations.write(parsed, data, results, chosen=[asdict(best) for best in chosen], mean_sd=seeds)
