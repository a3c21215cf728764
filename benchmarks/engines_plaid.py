"""A ColBERT-style engine, fast-plaid, on patch tokens: bytes an image, milliseconds a query; run by engines.py.

    python benchmarks/engines_plaid.py FOLDER RECORDS [TOKENS]

It needs fast-plaid, which is built for one version of torch, and nothing of this package.  Tokens are synthetic: 49 an
image, or TOKENS (16 are what pooling a map of 7 x 7 to 4 x 4 leaves), of 128 numbers, each near one of 2,000 centres,
an image's near six of them; queries have 12 tokens, each near one of an image's.  Exact is the sum over the query's
tokens of the largest product, over all images.  An index that is in FOLDER is asked, not built again.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from fast_plaid.search import FastPlaid

WIDTH, CENTRES, OWN, QUERIES, QUERY_TOKENS, WARM_UP, TOP = 128, 2_000, 6, 50, 12, 5, 10


def drawn(records: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of images (n, tokens, 128) and of queries (Q, 12, 128), of length 1."""
    torch.manual_seed(0)
    centres = torch.randn(CENTRES, WIDTH)
    own = torch.randint(CENTRES, (records, OWN))
    which = own.gather(1, torch.randint(OWN, (records, tokens)))
    images = torch.nn.functional.normalize(centres[which] + 0.7 * torch.randn(records, tokens, WIDTH), dim=-1)
    asked = torch.randint(records, (QUERIES + WARM_UP,))
    some = images[asked][:, torch.randperm(tokens)[:QUERY_TOKENS]]
    queries = torch.nn.functional.normalize(some + 0.05 * torch.randn_like(some), dim=-1)
    return images, queries


def exact(images: torch.Tensor, query: torch.Tensor) -> set[int]:
    """The ten best by the sum of maxima."""
    parts = [(part @ query.T).amax(dim=1).sum(dim=1) for part in images.split(1_000)]
    return set(torch.cat(parts).topk(TOP).indices.tolist())


def main() -> None:
    folder, records, tokens = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 49
    torch.set_num_threads(1)
    images, queries = drawn(records, tokens)
    there = folder.exists()
    engine, build_s = FastPlaid(index=str(folder), device="cpu"), None
    if not there:
        start = time.process_time()
        engine.create(
            documents_embeddings=list(images.half().float()), nbits=4, kmeans_niters=4, n_samples_kmeans=2_000
        )
        build_s = round(time.process_time() - start, 1)
    times, recalls = [], []
    for query in queries:
        start = time.perf_counter()
        (found,) = engine.search(query[None], top_k=TOP, show_progress=False)
        times.append(1e3 * (time.perf_counter() - start))
        recalls.append(len({row for row, _ in found} & exact(images, query)) / TOP)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    row = {
        "engine": f"fast-plaid {version('fast-plaid')}",
        "setting": f"{tokens} synthetic tokens of {WIDTH} numbers, 4 bits, recall against its own exact MaxSim",
        "records": records,
        "recall_at_10": round(statistics.mean(recalls), 4),
        "find_ms": {"p50": round(statistics.median(times[WARM_UP:]), 2)},
        "build_processor_s": build_s,
        "bytes_per_image": round(size / records),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
