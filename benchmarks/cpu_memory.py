"""Training on CPUs with glibc's allocator as it is, and told to keep the memory that a step frees.

    python benchmarks/cpu_memory.py --tower tf_efficientnet_lite0 --out docs/results/cpu_memory.json

glibc hands blocks of 32 MB and more back to the kernel at once, which clears each of their pages anew for the next
step.  Steps as in training_step.py, in processes of their own by turns, since the allocator reads its settings when a
process starts.  Linux with glibc only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import open_clip
from pair_common import record
from training_step import training_step
from ucm_accuracy import TOWERS, scales

KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "8000000000", "MALLOC_TOP_PAD_": "268435456"}
"""Take memory by growing the heap, 256 MB at a time, and give back only what lies above 8 GB of it."""
SIDES: dict[str, dict[str, str]] = {"as it is": {}, "kept": KEEP}


def add_model(tower: str, size: int) -> str:
    """Make open_clip know the model; its name."""
    vision = TOWERS["vision_cfg"] | {"timm_model_name": tower, "image_size": size, "timm_model_pretrained": False}
    with tempfile.TemporaryDirectory() as folder:
        config = TOWERS | {"vision_cfg": vision, "msa_cfg": {"image_scales": scales(1, 2, 3, 4), "heads": 3}}
        (Path(folder) / "benchmark.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder)
    return "benchmark"


def seconds_of_steps(options: argparse.Namespace) -> dict[str, float]:
    """In this process: the median step after a first one, the kernel's share of its time, the largest memory."""
    import resource

    step = training_step(add_model(options.tower, options.size), options)
    step()
    before = os.times()
    times = []
    for _ in range(options.steps):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    spent = os.times()
    system, user = spent.system - before.system, spent.user - before.user
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": statistics.median(times), "in_kernel": system / (system + user), "peak_gib": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", default="tf_efficientnet_lite0", help="a convolutional model of timm")
    parser.add_argument("--size", type=int, default=128, help="pixels")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--steps", type=int, default=3, help="in each process")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side")
    parser.add_argument("--out", type=Path, help="file to write")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.device = "cpu"
    if options.child:
        print(json.dumps(seconds_of_steps(options)))
        return
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for side, settings in SIDES.items():
            command = [sys.executable, *sys.argv, "--child"]
            answer = subprocess.run(command, env=os.environ | settings, check=True, capture_output=True, text=True)
            found[side].append(json.loads(answer.stdout.splitlines()[-1]))
            print(side, found[side][-1], flush=True)
    medians = {
        side: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for side, rows in found.items()
    }
    ratios = [one["seconds"] / other["seconds"] for one, other in zip(*found.values(), strict=True)]
    result: dict[str, Any] = {
        "about": record(),
        "settings": KEEP,
        **{name: getattr(options, name) for name in ("tower", "size", "batch", "amp")},
        "medians": medians,
        "times_as_fast": statistics.median(ratios),
        "by_round": ratios,
    }
    print(json.dumps(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
