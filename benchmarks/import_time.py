"""What the installed plugin adds to `import torch` and `import open_clip`.

    python benchmarks/import_time.py --out docs/results/import_time.json

Fresh processes in turns: with the plugin, and with torch told to load no entry points. Wall time and processor time of
the import statement, medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from pair_common import record

CHILD = """
import time
wall, processor = time.perf_counter(), time.process_time()
import {module}
print(time.perf_counter() - wall, time.process_time() - processor)
"""


def one_import(module: str, *, plugin: bool) -> tuple[float, float]:
    """Wall and processor milliseconds of an import in a process of its own."""
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "1" if plugin else "0"}
    command = [sys.executable, "-c", CHILD.format(module=module)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    wall, processor = (float(part) * 1e3 for part in answer.split())
    return wall, processor


def compare(module: str, rounds: int) -> dict[str, float]:
    one_import(module, plugin=True), one_import(module, plugin=False)
    runs = {plugin: [] for plugin in (True, False)}
    for number in range(rounds):
        for plugin in (True, False) if number % 2 else (False, True):
            runs[plugin].append(one_import(module, plugin=plugin))
    medians = {plugin: [statistics.median(column) for column in zip(*runs[plugin], strict=True)] for plugin in runs}
    (wall, processor), (bare_wall, bare_processor) = medians[True], medians[False]
    return {
        "wall_ms": wall,
        "wall_ms_without": bare_wall,
        "processor_ms": processor,
        "processor_ms_without": bare_processor,
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
