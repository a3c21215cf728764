"""Tables of heads_study.py's results as Markdown: means over seeds, and paired differences with 95 % intervals.

python benchmarks/heads_report.py docs/results/heads_study.jsonl
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from ucm_accuracy import mean_sd

PROTOCOLS = {
    "a_rsicd_val": "(a) RSICD val",
    "b_ucm_test": "(b) UCM test",
    "b_ucm_val": "(b) UCM val",
    "c_ucm": "(c) RSICD → UCM",
    "c_rsicd": "(c) UCM → RSICD",
    "d_unseen": "(d) unseen classes",
}
WAYS = ("fused", "fused 0.5", "fused 0.25")
Row = tuple[str, str]
"""Setting and ranking."""
PAIRS: list[tuple[Row, Row]] = [
    (("clip-views", "global"), ("clip", "global")),
    (("scales-mlp", "global"), ("clip", "global")),
    (("clip-mlp", "global"), ("clip-views", "global")),
    (("scales-mlp", "global"), ("clip-views", "global")),
    (("scales-mlp", "global"), ("clip-mlp", "global")),
    (("scales-mlp", "global"), ("clip-mlp-head", "global")),
    (("scales-mlp", "global"), ("scales-mlp-head", "global")),
    (("match-mlp", "global"), ("scales-mlp", "global")),
    (("match-mlp", "fused 0.25"), ("scales-mlp", "global")),
    *(((name, way), (name, "global")) for name in ("match-mlp", "match-mlp-head") for way in WAYS),
]
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t by degrees of freedom, from 1."""
Recalls = dict[Row, dict[str, dict[int, float]]]
"""mR by row, protocol and seed."""


def read(path: Path) -> Recalls:
    """The lines of a results file; a repeated run counts once, as its last line says."""
    recalls: Recalls = {}
    for line in map(json.loads, path.read_text().splitlines()):
        for protocol, by_ranking in line["mR"].items():
            for ranking, value in by_ranking.items():
                row = recalls.setdefault((line["setting"], ranking), {})
                row.setdefault(protocol, {})[line["seed"]] = value
    return recalls


def difference(one: dict[int, float], other: dict[int, float]) -> str:
    """Mean difference over common seeds, with its 95 % interval (Student's t, paired), and how many seeds."""
    values = [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]
    if not values:
        return ""
    interval = ""
    if len(values) > 1:
        half = T_975[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5
        interval = f" ± {half:.1f}"
    return f"{statistics.fmean(values):+.1f}{interval} ({len(values)})"


def table(name: str, rows: Sequence[tuple[str, dict[str, str]]]) -> str:
    """Markdown, one column a protocol."""
    lines = [[name, *PROTOCOLS.values()], ["---"] * (1 + len(PROTOCOLS))]
    lines += [[label, *(cells.get(protocol, "") for protocol in PROTOCOLS)] for label, cells in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, metavar="RESULTS.jsonl")
    recalls = read(parser.parse_args().results)
    means = [
        (", ".join(row), {key: f"{mean_sd(list(seeds.values()))} ({len(seeds)})" for key, seeds in found.items()})
        for row, found in recalls.items()
    ]
    print(table("setting, ranking", means), end="\n\n")
    differences = [
        (
            f"{', '.join(one)} − {', '.join(other)}",
            {key: difference(recalls[one].get(key, {}), recalls[other].get(key, {})) for key in PROTOCOLS},
        )
        for one, other in PAIRS
        if one in recalls and other in recalls
    ]
    print(table("difference", differences))


if __name__ == "__main__":
    main()
