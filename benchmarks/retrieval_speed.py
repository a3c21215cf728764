"""Time of exhaustive ranking, and of single queries over large indexes, on synthetic records.

    python benchmarks/retrieval_speed.py ranking --out docs/results/retrieval_ranking.json
    python benchmarks/retrieval_speed.py search --records 10000 100000 1000000 --out docs/results/retrieval_search.json

`ranking` is everything after the towers for a test set of RSICD's size: fold, scores of every pair by every ranking,
ranks both ways in both protocols.  `search` is a whole query: text tower, nearest by global features, MSCMAT on K
candidates.  Weights are random, vectors are drawn around 2,000 centres; neither changes the time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from msa_openclip import evaluation
from msa_openclip.eval_data import CaptionedImage, EvalSet
from msa_openclip.evaluation import EvalOptions, evaluate
from msa_openclip.image_index import ImageIndex
from msa_openclip.index import FORMAT, fingerprint
from msa_openclip.loading import LoadedModel, load
from msa_openclip.nearest import nearest
from msa_openclip.pair_scores import TextSide
from msa_openclip.scoring import EncodedImages, EncodedTexts, Scorer
from msa_openclip.search import Searcher
from msa_openclip.shards.records import Location

CAPTION_TOKENS = 16
SEGMENT = 50_000
KNOWN = {"place": {"url": "nowhere.tar", "offset": 512, "size": 20000}, "captions": [], "label": "x", "about": {}}
QUERIES = ("many planes are parked beside a terminal", "a river winds through green fields near a village")


class AfterTowers(Scorer):
    """Random vectors in the place of what the towers give."""

    def images(self, pixels: torch.Tensor) -> EncodedImages:
        mscmat = self.model.mscmat
        feature = F.normalize(torch.randn(len(pixels), self.model.text.output_dim), dim=-1)
        with torch.inference_mode():
            return self.fold(feature, torch.randn(len(pixels), self.scales, mscmat.ln_image.normalized_shape[0]))

    def texts(self, ids: torch.Tensor) -> EncodedTexts:
        mscmat = self.model.mscmat
        width = mscmat.ln_text.normalized_shape[0]
        feature = F.normalize(torch.randn(len(ids), self.model.text.output_dim), dim=-1)
        mask = torch.ones(len(ids), CAPTION_TOKENS, dtype=torch.bool)
        with torch.inference_mode():
            side = mscmat.fold_text(torch.randn(len(ids), CAPTION_TOKENS, width), mask, feature)
            return EncodedTexts(feature, TextSide(*side))


def ranking(model: LoadedModel, images: int, captions: int, rounds: int, memory_mb: int) -> dict[str, object]:
    """Seconds to rank `images` x `captions` both ways."""
    scorer, options = AfterTowers(model.scorer.model), EvalOptions(memory_mb=memory_mb)
    evaluation.batches = lambda images, preprocess, spans, workers: (torch.zeros(len(span), 1) for span in spans)

    def no_tokens(texts: list[str]) -> torch.Tensor:
        return torch.zeros(len(texts), 1)

    def run(data: EvalSet) -> tuple[float, float]:
        start, cpu_start = time.perf_counter(), time.process_time()
        evaluate(scorer, data, model.preprocess, no_tokens, options)
        return time.perf_counter() - start, time.process_time() - cpu_start

    run(synthetic(100, 200))  # warms up
    data = synthetic(images, captions)
    seconds, cpu_seconds = zip(*(run(data) for _ in range(rounds)), strict=True)
    return {
        "images": images,
        "captions": captions,
        "memory_mb": memory_mb,
        "rankings": len(scorer.rankings),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "median_s": statistics.median(seconds),
    }


def synthetic(images: int, captions: int) -> EvalSet:
    """Images nowhere, with captions that all differ."""
    numbers = range(captions // images)
    return EvalSet(
        [CaptionedImage(str(i), Location("nowhere"), tuple(f"{i} {n}" for n in numbers)) for i in range(images)],
        "synthetic",
    )


def write_index(folder: Path, model: LoadedModel, records: int) -> None:
    """An index of random vectors, as `build_index` lays it out."""
    generator = np.random.default_rng(0)
    width, scales = model.scorer.model.text.output_dim, model.scorer.scales
    centres = generator.standard_normal((2000, width), dtype=np.float32)
    segments = []
    for start in range(0, records, SEGMENT):
        count = min(SEGMENT, records - start)
        name = f"{start:016x}"
        (folder / name).mkdir(parents=True)
        noise = generator.standard_normal((count, width), dtype=np.float32)
        features = centres[generator.integers(0, 2000, count)] + noise
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        np.save(folder / name / "features.npy", features.astype(np.float16))
        inner = model.scorer.model.mscmat.ln_image.normalized_shape[0]
        projected = generator.standard_normal((count, scales, inner), dtype=np.float32).astype(np.float16)
        np.save(folder / name / "projected.npy", projected)
        rows = ({"image_id": f"tile_{start + row}", **KNOWN} for row in range(count))
        (folder / name / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        segments.append({"name": name, "images": count})
    manifest = {"format": FORMAT, "model": model.spec, "fingerprint": fingerprint(model.scorer), "segments": segments}
    (folder / "index.json").write_text(json.dumps(manifest))


def search(
    model: LoadedModel, records: int, candidates: int, queries: int, kind: str, scratch: str
) -> dict[str, object]:
    """Milliseconds of single queries."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        root = Path(folder) / "index"
        write_index(root, model, records)
        size = {
            name: sum(p.stat().st_size for p in root.rglob(name)) / records
            for name in ("features.npy", "projected.npy")
        }
        start = time.perf_counter()
        index = ImageIndex(str(root), model)
        opened = time.perf_counter() - start
        start = time.perf_counter()
        find = nearest(index, kind)
        built = time.perf_counter() - start
        searcher = Searcher(index, candidates=candidates, nearest=find)
        texts = [f"{QUERIES[number % 2]} {number}" for number in range(queries + 5)]
        whole = [timed(lambda text=text: searcher.by_text([text], k=10)) for text in texts][
            5:
        ]  # the first ones warm up
        tower = [timed(lambda text=text: model.scorer.texts(model.tokenizer([text]))) for text in texts][5:]
        shutil.rmtree(root)
    return {
        "records": records,
        "candidates": candidates,
        "nearest": kind,
        "open_s": opened,
        "build_nearest_s": built,
        "p50_ms": statistics.median(ms for ms, _ in whole),
        "p95_ms": sorted(ms for ms, _ in whole)[int(0.95 * len(whole))],
        "cpu_p50_ms": statistics.median(cpu_ms for _, cpu_ms in whole),
        "text_tower_p50_ms": statistics.median(ms for ms, _ in tower),
        "text_tower_cpu_p50_ms": statistics.median(cpu_ms for _, cpu_ms in tower),
        "bytes_per_image": size,
    }


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds on the clock, and of the processor (all threads)."""
    start, cpu_start = time.perf_counter(), time.process_time()
    call()
    return 1e3 * (time.perf_counter() - start), 1e3 * (time.process_time() - cpu_start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ranking", "search"))
    parser.add_argument("--model", default="MSA-ViT-B")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, default=1093)
    parser.add_argument("--captions", type=int, default=5465)
    parser.add_argument("--memory-mb", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--records", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--candidates", type=int, default=256)
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--nearest", default="auto")
    parser.add_argument("--scratch", help="folder for the synthetic index")
    parser.add_argument("--out", required=True)
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    model = load(f"{parsed.model}=untrained")
    if parsed.what == "ranking":
        rows = [ranking(model, parsed.images, parsed.captions, parsed.rounds, parsed.memory_mb)]
    else:
        rows = [
            search(model, n, parsed.candidates, parsed.queries, parsed.nearest, parsed.scratch or tempfile.gettempdir())
            for n in parsed.records
        ]
    for row in rows:
        print(json.dumps(row))
    setting = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "threads": parsed.threads,
        "model": parsed.model,
        "torch": torch.__version__,
        "command": re.sub(r"[^ =]*/", "", " ".join(sys.argv)),  # names, no places
    }
    Path(parsed.out).parent.mkdir(parents=True, exist_ok=True)
    Path(parsed.out).write_text(json.dumps({"setting": setting, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
