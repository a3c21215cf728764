"""Time of single queries over indexes of random records, whole and by stage.

    python benchmarks/retrieval_search.py --records 10000 100000 1000000 --scratch FOLDER --build-only
    python benchmarks/retrieval_search.py --records 10000 100000 1000000 --scratch FOLDER \\
        --out docs/results/retrieval_search.json

The indexes are those of index_scale.py, kept in FOLDER (5.3 GB for a million records), so that building them, which
takes minutes, and asking them can be two calls.  Weights are random; global features lie around 2,000 centres, those
of the queries too, since random weights give all texts much the same one.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from index_scale import build as build_index
from index_scale import unit_vectors
from retrieval_common import WARM_UP, timings, write_result

from msa_openclip.evaluation.loading import LoadedModel, load
from msa_openclip.evaluation.scorer import EncodedTexts, Scorer
from msa_openclip.search.index import ImageIndex
from msa_openclip.search.nearest import nearest
from msa_openclip.search.searcher import Searcher, scan

QUERIES = ("many planes are parked beside a terminal", "a river winds through green fields near a village")


class Spread(Scorer):
    """The real text tower, but features near the centres of the index."""

    def texts(self, ids: torch.Tensor) -> EncodedTexts:
        encoded = super().texts(ids)
        count, width = encoded.feature.shape
        return encoded._replace(feature=torch.from_numpy(unit_vectors(int(ids.sum()), count, width)))


def build(model: LoadedModel, records: int, kind: str, scratch: str) -> tuple[Path, dict[str, float]]:
    """An index and what its nearest are found by; what is there already is not built again."""
    root, written_s = build_index(model, records, Path(scratch))
    start = time.perf_counter()
    nearest(ImageIndex(str(root), model), kind)
    path = root / "built.json"
    if not path.exists():
        path.write_text(json.dumps({"write_s": written_s, "build_nearest_s": round(time.perf_counter() - start, 1)}))
    return root, dict(json.loads(path.read_text()))


def ask(model: LoadedModel, records: int, candidates: int, queries: int, kind: str, scratch: str) -> dict[str, object]:
    """Milliseconds of single queries on an index whose vectors are in the page cache."""
    root, built = build(model, records, kind, scratch)
    scorer = Spread(model.scorer.model)
    start = time.perf_counter()
    index = ImageIndex(str(root), replace(model, scorer=scorer))
    find = nearest(index, kind)
    opened = time.perf_counter() - start
    for path in root.rglob("*.npy"):
        path.read_bytes()
    searcher = Searcher(index, candidates=candidates, nearest=find)
    texts = [f"{QUERIES[number % 2]} {number}" for number in range(queries + WARM_UP)]
    whole = timings(texts, lambda text: searcher.by_text([text], k=10))
    tower = timings(texts, lambda text: scorer.texts(model.tokenizer([text])))
    with torch.inference_mode():
        padded = timings(texts, lambda text: scorer.model.text_side(model.tokenizer([text])))
    features = torch.cat([scorer.texts(model.tokenizer([text])).feature for text in texts])
    near = timings(features.split(1), lambda feature: find(feature, candidates))
    exact, found = scan(index, features, 10)[1], find(features, candidates)[1]
    among = (exact[:, :, None] == found[:, None, :]).any(dim=2).double().mean()
    sizes = {name: sum(p.stat().st_size for p in root.rglob(name)) for name in ("features.npy", "projected.npy")}
    return {
        "records": records,
        "candidates": candidates,
        "nearest": kind,
        **built,
        "open_s": round(opened, 2),
        "query_ms": whole,
        "text_tower_ms": tower,
        "text_tower_with_padding_ms": padded,
        "nearest_ms": near,
        "search_without_tower_p50_ms": round(whole["p50"] - tower["p50"], 2),
        "exact_top_10_among_candidates": round(float(among), 4),
        "bytes_per_image": {name: round(size / records, 1) for name, size in sizes.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="MSA-ViT-B")
    parser.add_argument("--records", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--candidates", type=int, default=256)
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--nearest", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", required=True, help="folder that keeps the indexes")
    parser.add_argument("--build-only", action="store_true")
    parser.add_argument("--out")
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    torch.manual_seed(0)  # the same weights in every call
    model = load(f"{parsed.model}=untrained")
    rows = []
    for records in parsed.records:
        if parsed.build_only:
            print(json.dumps(build(model, records, parsed.nearest, parsed.scratch)[1]), flush=True)
            continue
        rows.append(ask(model, records, parsed.candidates, parsed.queries, parsed.nearest, parsed.scratch))
        print(json.dumps(rows[-1]), flush=True)
    if parsed.out:
        write_result(parsed.out, rows, model=parsed.model)


if __name__ == "__main__":
    main()
