"""What the retrieval benchmarks share: timings of single calls, and results with the setting they were found in."""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from pair_common import record

WARM_UP = 5
T = TypeVar("T")


def timings(inputs: Sequence[T], call: Callable[[T], object]) -> dict[str, float]:
    """p50 and p95 of `call` in milliseconds on the clock, and p50 of the processor's (all threads), after a warm-up."""
    clock, processor = [], []
    for one in inputs:
        start, processor_start = time.perf_counter(), time.process_time()
        call(one)
        clock.append(1e3 * (time.perf_counter() - start))
        processor.append(1e3 * (time.process_time() - processor_start))
    clock = sorted(clock[WARM_UP:])
    return {
        "p50": round(statistics.median(clock), 2),
        "p95": round(clock[int(0.95 * len(clock))], 2),
        "cpu_p50": round(statistics.median(processor[WARM_UP:]), 2),
    }


def write_result(path: str, rows: Sequence[dict[str, object]], **setting: object) -> None:
    """Write rows with machine, versions and command to a JSON file."""
    known = record()
    known["command"] = re.sub(r"[^ =]*/", "", known["command"])  # names, no places
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps({"setting": known | setting, "rows": rows}, indent=2) + "\n")
