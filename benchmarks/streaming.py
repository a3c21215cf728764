"""Shards -> training batches: our loader against open_clip's own, and the bytes that an epoch reads in each layout.

    python benchmarks/streaming.py --pair 'pair/train-{000000..000007}.tar' \\
        --image 'image/train-{000000..000007}.tar' --out docs/results/streaming.json

Both loaders read the same pair shards with the same transform and tokenizer, round by round in one process; the first
round warms the file cache and is not counted.  Reported are medians of epochs, the ratio within each round, and, for 0
workers, the processor time, which other programs on the machine disturb least.  Bytes are those that leave a store
without a cache, for readers (workers x ranks) that split the same shards.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fsspec
import open_clip
import open_clip_train.data
import torch
from machine import cpu_name
from open_clip_train.params import parse_args

from msa_openclip.data import streams

LOADERS = ("open_clip", "msa_openclip")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", required=True, help="training shards, a sample per caption")
    parser.add_argument("--image", required=True, help="training shards of the same images, a sample per image")
    parser.add_argument("--model", default="MSA-ViT-Ti")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rate-shards", type=int, default=2, help="shards in an epoch of the comparison of rates")
    parser.add_argument("--readers", type=int, nargs="+", default=[1, 2, 8, 16])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "command": "python " + " ".join(sys.argv),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("open_clip_torch", "webdataset", "torch", "pillow")},
        "rate": {f"{workers} workers": rates(options, workers) for workers in options.workers},
        "bytes_per_epoch": {
            "pair": bytes_read(options, options.pair),
            "image": bytes_read(options, options.image),
        },
    }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def arguments(options: Namespace, pattern: str, workers: int = 0, rank: int = 0, ranks: int = 1) -> Namespace:
    parsed = parse_args(["--model", options.model, "--train-data", pattern, "--dataset-type", "webdataset"])
    parsed.batch_size, parsed.workers, parsed.rank, parsed.world_size = options.batch_size, workers, rank, ranks
    return parsed


def rates(options: Namespace, workers: int) -> dict[str, Any]:
    """Samples per second of both loaders, and their ratio."""
    _, transform, _ = open_clip.create_model_and_transforms(options.model)
    tokenizer = open_clip.get_tokenizer(options.model)
    ours = open_clip_train.data.get_wds_dataset
    functions = dict(zip(LOADERS, (ours.__wrapped__, ours), strict=True))
    data = {}
    for name, function in functions.items():
        shards = open_clip_train.data.expand_urls(options.pair)[0][: options.rate_shards]
        args = arguments(options, "::".join(shards), workers)
        data[name] = function(args, transform, is_train=True, tokenizer=tokenizer)
    seconds: dict[str, list[float]] = {name: [] for name in LOADERS}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in LOADERS}
    for turn in range(options.rounds + 1):
        for name in LOADERS if turn % 2 else LOADERS[::-1]:
            data[name].set_epoch(turn)
            start, cpu_start = time.perf_counter(), time.process_time()
            samples = sum(len(images) for images, _ in data[name].dataloader)
            if turn:
                seconds[name].append((time.perf_counter() - start) / samples)
                cpu_seconds[name].append((time.process_time() - cpu_start) / samples)
    result: dict[str, Any] = {
        "samples_per_s": {name: round(1 / statistics.median(values)) for name, values in seconds.items()},
        "rate_over_open_clip": ratios(seconds),
    }
    if not workers:
        cpu = {name: round(1e6 * statistics.median(values)) for name, values in cpu_seconds.items()}
        result |= {"cpu_us_per_sample": cpu, "cpu_rate_over_open_clip": ratios(cpu_seconds)}
    return result


def ratios(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """How much faster ours is than open_clip's in the same round."""
    each = [theirs / ours for theirs, ours in zip(*(seconds[name] for name in LOADERS), strict=True)]
    return {"median": round(statistics.median(each), 3), "rounds": [round(ratio, 2) for ratio in each]}


class CountingFile(streams.RemoteFile):
    """A remote file that counts what is read."""

    total = 0

    def read(self, size: int = -1) -> bytes:
        data = super().read(size)
        CountingFile.total += len(data)
        return data


def bytes_read(options: Namespace, pattern: str) -> dict[str, Any]:
    """Bytes and rows of one epoch, for different numbers of readers."""
    folder = Path(pattern).parent
    memory = fsspec.filesystem("memory")
    for path in (*map(Path, open_clip_train.data.expand_urls(pattern)[0]), folder / "sizes.json"):
        memory.pipe(f"/bench/{path.name}", path.read_bytes())
    remote = f"memory://bench/{Path(pattern).name}"
    original, streams.RemoteFile = streams.RemoteFile, CountingFile  # type: ignore[misc]
    rows, found = 0, {}
    try:
        for readers in options.readers:
            total = rows = 0
            for rank in range(readers):
                data = open_clip_train.data.get_wds_dataset(
                    arguments(options, remote, rank=rank, ranks=readers), one_number, is_train=True, tokenizer=no_tokens
                )
                CountingFile.total = 0  # not what is looked at before the epoch
                rows += sum(len(images) for images, _ in data.dataloader)
                total += CountingFile.total
            found[f"{readers} readers"] = {"mb": round(total / 1e6, 1), "rows": rows}
    finally:
        streams.RemoteFile = original  # type: ignore[misc]
        memory.rm("/bench", recursive=True)
    stored = sum(path.stat().st_size for path in map(Path, open_clip_train.data.expand_urls(pattern)[0]))
    return {"stored_mb": round(stored / 1e6, 1), **found}


def one_number(_: Any) -> torch.Tensor:
    return torch.zeros(1)


def no_tokens(captions: list[str]) -> torch.Tensor:
    return torch.zeros(len(captions), 1)


if __name__ == "__main__":
    main()
