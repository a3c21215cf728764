"""Images a second of an embedding job beside its tower alone and a plain loop, and of two workers beside one.

    python benchmarks/embed.py --folder UCM/images --out docs/results/embed.json

Sides of `one worker`, in turns in one process, one thread of the tower:

    plain          images of a batch read and prepared, then encoded, as a loop of ten lines does it; float32
    tower-*        the tower's forward loop over pixels that are there, in the form in which an Embedder has it
    job-*          `write_vectors`: files in, a partition with all vectors on the disk

`two workers`: two processes with a partition each, beside one of them alone, and the same of their towers alone: what
the machine lets two processes have that share its memory and caches.  Weights are random.  On a machine with other work
the share of the clock that a process gets varies, so ratios are taken within a turn, of the clock and of the
processor's time, and their medians are what counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import open_clip
import torch
from retrieval_common import write_result

from msa_openclip.data.captioned import CaptionedImage
from msa_openclip.data.pixels import batch_spans, image_pixels
from msa_openclip.data.readers import read_folder
from msa_openclip.embedding.embedder import Embedder
from msa_openclip.embedding.partitions import Partition, write_vectors
from msa_openclip.evaluation.encoder import image_scorer
from msa_openclip.evaluation.loading import load
from msa_openclip.evaluation.scorer import Scorer

TEXT = {"context_length": 32, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 4}
SCALES = [{"stage": stage, "pool": "avg" if stage == 4 else "max"} for stage in (1, 2, 3, 4)]
TIMM = {"resnet18": "resnet18", "lite0": "tf_efficientnet_lite0"}
"""Convolutional towers at 224 px under a small text tower, beside the models that open_clip knows."""
PRECISIONS = ("fp32", "bf16")
Seconds = tuple[float, float]
"""On the clock and of the processor."""


def add_configs(folder: Path) -> None:
    """Make the models of TIMM known here and in processes that are started from here."""
    for name, tower in TIMM.items():
        vision = {"timm_model_name": tower, "timm_pool": "avg", "timm_proj": "linear", "image_size": 224}
        msa = {"image_scales": SCALES, "heads": 3}
        config = {"embed_dim": 192, "vision_cfg": vision, "text_cfg": TEXT, "custom_text": True, "msa_cfg": msa}
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    os.environ["MSA_OPENCLIP_CONFIGS"] = str(folder)


def sides(name: str, images: Sequence[CaptionedImage], batch_size: int, scratch: Path) -> dict[str, Callable[[], Any]]:
    """What is timed of a model, by name."""
    model = load(f"{name}=untrained")  # stays as it is loaded, channels first
    pixels = [image_pixels(image, model.preprocess) for image in images]

    def plain() -> None:
        for span in batch_spans(len(images), batch_size):
            batch = [image_pixels(image, model.preprocess) for image in images[span.start : span.stop]]
            model.scorer.project(torch.stack(batch))

    def job(embedder: Embedder) -> None:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            write_vectors(Partition(0, 1, images), embedder, folder)

    found: dict[str, Callable[[], Any]] = {"plain": plain}
    fast = load(f"{name}=untrained")  # gets the layout of an Embedder
    for precision in PRECISIONS:
        tower = image_scorer(fast.scorer, precision)
        embedder = Embedder(fast, precision=precision, batch_size=batch_size)
        found[f"tower-{precision}"] = lambda tower=tower: forward(tower, pixels, batch_size)
        found[f"job-{precision}"] = lambda embedder=embedder: job(embedder)
    return found


def forward(scorer: Scorer, pixels: Sequence[torch.Tensor], batch_size: int) -> None:
    """The tower alone."""
    for span in batch_spans(len(pixels), batch_size):
        scorer.project(torch.stack(list(pixels[span.start : span.stop])))


def one_worker(
    name: str, images: Sequence[CaptionedImage], batch_size: int, rounds: int, scratch: Path
) -> dict[str, Any]:
    """Images a second of every side, and of each job its ratio to its tower and to the plain loop."""
    works = sides(name, images, batch_size, scratch)
    for work in works.values():
        work()  # warms up
    turns = [{side: _seconds(work) for side, work in works.items()} for _ in range(rounds)]
    pairs = [("job-fp32", "tower-fp32"), ("job-bf16", "tower-bf16"), ("job-fp32", "plain"), ("job-bf16", "plain")]
    return {
        "what": "one worker",
        "model": name,
        "images": len(images),
        "images_per_s": {side: _rates(turns, side, len(images)) for side in works},
        "ratios": {f"{one} / {other}": _ratios(turns, one, other) for one, other in pairs},
    }


def _rates(turns: Sequence[dict[str, Seconds]], side: str, count: int) -> dict[str, float]:
    clock, processor = (statistics.median(count / turn[side][which] for turn in turns) for which in (0, 1))
    return {"clock": round(clock, 2), "cpu": round(processor, 2)}


def _ratios(turns: Sequence[dict[str, Seconds]], one: str, other: str) -> dict[str, float]:
    """How many times as many images `one` does, median of the turns."""
    clock, processor = (statistics.median(turn[other][which] / turn[one][which] for turn in turns) for which in (0, 1))
    return {"clock": round(clock, 3), "cpu": round(processor, 3)}


def _seconds(work: Callable[[], object]) -> Seconds:
    start, cpu_start = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - cpu_start


_WORKER: dict[str, Any] = {}


def _start_worker(name: str, batch_size: int) -> None:
    torch.manual_seed(0)
    model = load(f"{name}=untrained")
    embedder = Embedder(model, precision="fp32", batch_size=batch_size, threads=1)
    _WORKER.update(model=model, embedder=embedder, tower=image_scorer(model.scorer, "fp32"), batch_size=batch_size)


def _embed(images: Sequence[CaptionedImage], scratch: Path) -> Seconds:
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        return _seconds(lambda: write_vectors(Partition(0, 1, images), _WORKER["embedder"], folder))


def _forward(images: Sequence[CaptionedImage], _: Path) -> Seconds:
    pixels = [image_pixels(image, _WORKER["model"].preprocess) for image in images]
    return _seconds(lambda: forward(_WORKER["tower"], pixels, _WORKER["batch_size"]))


def two_workers(
    name: str, images: Sequence[CaptionedImage], batch_size: int, rounds: int, scratch: Path
) -> dict[str, Any]:
    """How many times as many images two processes embed as one of them does alone, each with as many images."""
    pools = [
        ProcessPoolExecutor(1, get_context("spawn"), initializer=_start_worker, initargs=(name, batch_size))
        for _ in range(2)
    ]
    works = {"job": _embed, "tower": _forward}
    turns: dict[str, list[Seconds]] = {side: [] for side in works}
    for number in range(rounds + 1):
        for side, work in works.items():
            alone = pools[0].submit(work, images, scratch).result()
            both = [future.result() for future in [pool.submit(work, images, scratch) for pool in pools]]
            clock, processor = max(seconds for seconds, _ in both), statistics.mean(seconds for _, seconds in both)
            if number:  # the first turn warms up
                turns[side].append((2 * alone[0] / clock, 2 * alone[1] / processor))
    for pool in pools:
        pool.shutdown()
    return {
        "what": "two workers",
        "model": name,
        "images": len(images),
        "times_one": {side: _medians(found) for side, found in turns.items()},
        "turns": {side: [round(clock, 3) for clock, _ in found] for side, found in turns.items()},
    }


def _medians(ratios: Sequence[Seconds]) -> dict[str, float]:
    return {name: round(statistics.median(one[at] for one in ratios), 3) for at, name in enumerate(("clock", "cpu"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="of images")
    parser.add_argument("--workers", type=int, nargs="+", choices=(1, 2), default=[1, 2], help="what to measure")
    parser.add_argument("--models", nargs="+", default=["resnet18", "lite0", "MSA-ViT-B"])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out")
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    images = read_folder(parsed.folder)[: parsed.images]
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "configs").mkdir()
        add_configs(Path(scratch) / "configs")
        for workers, name in ((workers, name) for workers in parsed.workers for name in parsed.models):
            measure = (one_worker, two_workers)[workers - 1]
            rows.append(measure(name, images, parsed.batch_size, parsed.rounds, Path(scratch)))
            print(json.dumps(rows[-1]), flush=True)
            if parsed.out:
                write_result(parsed.out, rows)


if __name__ == "__main__":
    main()
