"""How many candidates K make fast-then-fine search equal to the exhaustive fused ranking, on real images.

    python benchmarks/retrieval_candidates.py MSA-ViT-B=epoch_9.pt --captions dataset_ucm.json --images images \\
        --out docs/results/retrieval_candidates.json --plot docs/results/retrieval_candidates.svg

All images of the caption file are indexed, the distinct captions of its test split asked.  Reported for each K: the
share of the exhaustive top 10 that search finds, and seconds a query (text tower included).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import tempfile
import time
from pathlib import Path

import torch

from msa_openclip.data.readers import read_captions
from msa_openclip.evaluation.loading import load
from msa_openclip.search.build import build_index
from msa_openclip.search.index import ImageIndex
from msa_openclip.search.searcher import Searcher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--captions", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--candidates", type=int, nargs="+", default=[10, 16, 32, 64, 128, 256, 512, 1024])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", required=True)
    parser.add_argument("--plot")
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    model = load(parsed.model)
    images = read_captions(parsed.captions, parsed.images)
    asked = read_captions(parsed.captions, parsed.images, split="test")
    queries = list(dict.fromkeys(caption for image in asked for caption in image.captions))
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        build_index(model, images, folder)
        build_s = time.perf_counter() - start
        index = ImageIndex(folder, model)
        exhaustive = [
            {hit.image.image_id for hit in hits} for hits in Searcher(index, candidates=len(images)).by_text(queries)
        ]
        rows = []
        for candidates in parsed.candidates:
            searcher = Searcher(index, candidates=candidates)
            start = time.perf_counter()
            found = searcher.by_text(queries)
            seconds = (time.perf_counter() - start) / len(queries)
            same = sum(len({h.image.image_id for h in hits} & e) for hits, e in zip(found, exhaustive, strict=True))
            agreement = same / (10 * len(queries))
            rows.append({"candidates": candidates, "agreement": agreement, "ms_per_query": 1e3 * seconds})
            print(json.dumps(rows[-1]))
    setting = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "threads": parsed.threads,
        "model": parsed.model.split("=")[0],
        "torch": torch.__version__,
        "images": len(images),
        "queries": len(queries),
        "index_images_per_s": len(images) / build_s,
        "command": re.sub(r"[^ =]*/", "", " ".join(sys.argv)),  # names, no places
    }
    Path(parsed.out).parent.mkdir(parents=True, exist_ok=True)
    Path(parsed.out).write_text(json.dumps({"setting": setting, "rows": rows}, indent=2) + "\n")
    if parsed.plot:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axis = figure.subplots()
        axis.plot([row["candidates"] for row in rows], [100 * row["agreement"] for row in rows], marker="o")
        axis.axhline(99, color="#888", linewidth=0.8)
        axis.set(xscale="log", xlabel="candidates K", ylabel="top 10 as exhaustive, %")
        axis.set_xticks([row["candidates"] for row in rows], [str(row["candidates"]) for row in rows])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        figure.savefig(parsed.plot)


if __name__ == "__main__":
    main()
