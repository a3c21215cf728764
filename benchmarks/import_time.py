"""What the installed plugin adds to `import torch` and `import open_clip`.

    python benchmarks/import_time.py --out docs/results/import_time.json

Fresh processes in turns: with the plugin, and with its entry point found but replaced by nothing, since torch looks for
entry points in any case. Wall and processor time of the import statement, and of the plugin's own load and activation,
medians; the last is the precise one, the difference of the first two drowns in the time of torch itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from pair_common import record

CHILD = """
import gc
import importlib.metadata
import time

gc.disable()  # one collection among so many modules takes 200 ms, and falls now here, now there

load, activation = importlib.metadata.EntryPoint.load, 0.0

def timed_load(entry_point):
    global activation
    if entry_point.name != "msa_openclip":
        return load(entry_point)
    if not {plugin}:
        return lambda: None
    start = time.perf_counter()
    activate = load(entry_point)
    activation = time.perf_counter() - start

    def timed_activate():
        global activation
        start = time.perf_counter()
        activate()
        activation += time.perf_counter() - start

    return timed_activate

importlib.metadata.EntryPoint.load = timed_load
wall, processor = time.perf_counter(), time.process_time()
import {module}
print(time.perf_counter() - wall, time.process_time() - processor, activation)
"""


def one_import(module: str, *, plugin: bool) -> list[float]:
    """Wall, processor and activation milliseconds of an import in a process of its own."""
    command = [sys.executable, "-c", CHILD.format(module=module, plugin=plugin)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [float(part) * 1e3 for part in answer.split()]


def compare(module: str, rounds: int) -> dict[str, float]:
    one_import(module, plugin=True), one_import(module, plugin=False)
    runs = {plugin: [] for plugin in (True, False)}
    for number in range(rounds):
        for plugin in (True, False) if number % 2 else (False, True):
            runs[plugin].append(one_import(module, plugin=plugin))
    medians = {plugin: [statistics.median(column) for column in zip(*runs[plugin], strict=True)] for plugin in runs}
    (wall, processor, activation), (bare_wall, bare_processor, _) = medians[True], medians[False]
    return {
        "wall_ms": wall,
        "wall_ms_without": bare_wall,
        "processor_ms": processor,
        "processor_ms_without": bare_processor,
        "activation_ms": activation,
        "added_processor_ms": processor - bare_processor,
        "added_processor_percent": 100 * (processor / bare_processor - 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", help="file to write")
    options = parser.parse_args()
    result = {"about": record()}
    for module in ("torch", "open_clip"):
        result[module] = compare(module, options.rounds)
        print(module, json.dumps(result[module]), flush=True)
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
