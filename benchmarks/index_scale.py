"""Size of indexes of random records, time to open them and to ask them: flat, IVF-PQ, in a box, by condition.

    python benchmarks/index_scale.py --records 100000 1000000 --scratch FOLDER --out docs/results/index_scale.json

The format before, over the same vectors in the same order (links to the files of today's index, so run this second):

    git worktree add OLD e96abac && python -m pip install --no-deps --target BEFORE OLD
    PYTHONPATH=BEFORE python benchmarks/index_scale.py --records 100000 1000000 --scratch FOLDER \\
        --out docs/results/index_scale_before.json

Indexes are written by the product's own writer and kept in FOLDER, 5.3 GB for a million records.  Records are tiles of
0.01 degrees side by side with a class, a date and a share of clouds; vectors are random, global features near 2,000
centres.  Sentences are encoded beforehand: their tower does not know how large an index is.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from retrieval_common import WARM_UP, timings, write_result

from msa_openclip.data.captioned import CaptionedImage
from msa_openclip.evaluation.loading import LoadedModel, load
from msa_openclip.evaluation.scorer import EncodedTexts, Scorer
from msa_openclip.search import files
from msa_openclip.search.files import FORMAT, Manifest, is_written, read_segment, write_manifest, write_segment
from msa_openclip.search.filters import SearchFilter
from msa_openclip.search.fingerprint import fingerprint, settings
from msa_openclip.search.index import ImageIndex
from msa_openclip.search.nearest import nearest
from msa_openclip.search.options import SEGMENT_IMAGES
from msa_openclip.search.searcher import Searcher, scan
from msa_openclip.shards.records import Location

TODAY = 4
"""The format of this checkout; 3 is the one before."""
CENTRES = 2_000
CLASSES = ("river", "farmland", "forest", "harbor", "airport")
WEST, SOUTH, TILE_DEGREES = 5.0, 45.0, 0.01
BOX = (WEST + 0.101, SOUTH + 0.101, WEST + 0.399, SOUTH + 0.399)
"""Overlaps 30 x 30 tiles, or as many of them as have an index."""
CONDITION = "cloud < 1 and class = 'river'"
ROWS = 256
T = TypeVar("T")


class KnownTexts(Scorer):
    """Scores sentences that were encoded beforehand; their features lie near the centres of the index."""

    def __init__(self, model: LoadedModel, texts: Sequence[str]) -> None:
        super().__init__(model.scorer.model)
        self.known = {}
        for number, text in enumerate(texts):
            ids = model.tokenizer([text])
            encoded = model.scorer.texts(ids)
            feature = torch.from_numpy(unit_vectors(10**6 + number, 1, encoded.feature.shape[1]))
            self.known[ids.numpy().tobytes()] = encoded._replace(feature=feature)

    def texts(self, ids: torch.Tensor) -> EncodedTexts:
        return self.known[ids.numpy().tobytes()]


@cache
def centres(width: int) -> NDArray[np.float32]:
    """(CENTRES, width)."""
    return np.random.default_rng(0).standard_normal((CENTRES, width), dtype=np.float32)


def unit_vectors(seed: int, count: int, width: int) -> NDArray[np.float32]:
    """Random (count, width) around CENTRES centres, which are the same for every seed."""
    generator = np.random.default_rng(seed)
    values = centres(width)[generator.integers(0, CENTRES, count)]
    values += generator.standard_normal((count, width), dtype=np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def tiles(numbers: Iterable[int], side: int) -> list[CaptionedImage]:
    """Tiles of a square of `side` x `side`, by their numbers; 1,000 of them are windows of one scene."""
    return [_tile(number, *divmod(number, side)) for number in numbers]


def _tile(number: int, row: int, column: int) -> CaptionedImage:
    west, south = round(WEST + TILE_DEGREES * column, 4), round(SOUTH + TILE_DEGREES * row, 4)
    east, north = round(west + TILE_DEGREES, 4), round(south + TILE_DEGREES, 4)
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    geo = {"bounds": [west, south, east, north], "footprint": {"type": "Polygon", "coordinates": [ring]}}
    meta = {"date": f"2024-{number % 12 + 1:02}-{number % 28 + 1:02}", "cloud": number * 7919 % 10_000 / 100}
    window = (256 * (number % 32), 256 * (number // 32 % 32), 256, 256)
    place = Location(f"scenes/S2A_{number // 1000:06}.tif", window=window)
    about = {"geo": geo, "meta": meta}
    return CaptionedImage(f"{number:09}", place, (), CLASSES[number % len(CLASSES)], about, f"{number:032x}")


def build(model: LoadedModel, records: int, scratch: Path) -> tuple[Path, float | None]:
    """The index of so many records in the installed format, and the seconds it took; None if it was there."""
    root, start = scratch / f"{model.spec.partition('=')[0]}-{records}-format-{FORMAT}", time.perf_counter()
    if (root / "index.json").exists():
        return root, None
    root.mkdir(parents=True, exist_ok=True)
    manifest = Manifest(model.spec, fingerprint(model.scorer), settings(model))
    write = _write_today if FORMAT == TODAY else _write_before
    names = {f"{first:016x}": first for first in range(0, records, SEGMENT_IMAGES)}
    for name, first in names.items():
        if not is_written(root, name):  # an interrupted build goes on
            write(root, name, manifest, model, records, first)
    write_manifest(root, replace(manifest, segments=tuple(read_segment(root, name) for name in names)))
    return root, round(time.perf_counter() - start, 1)


def _write_today(root: Path, name: str, manifest: Manifest, model: LoadedModel, records: int, first: int) -> None:
    from msa_openclip.search.schema import to_table

    count, inner = min(SEGMENT_IMAGES, records - first), model.scorer.model
    features = unit_vectors(first + 1, count, inner.text.output_dim).astype(np.float16)
    shape = (count, model.scorer.scales, inner.mscmat.ln_image.normalized_shape[0])
    projected = np.random.default_rng(first).standard_normal(shape, dtype=np.float32).astype(np.float16)
    images = tiles(range(first, first + count), math.isqrt(records))
    write_segment(root, name, manifest, to_table(images), features, projected)


def _write_before(root: Path, name: str, manifest: Manifest, model: LoadedModel, records: int, first: int) -> None:
    """The same rows in the format before; its arrays are equal, so they become links to those of today's."""
    today = root.with_name(f"{root.name.removesuffix(str(FORMAT))}{TODAY}")
    ids = pq.read_table(today / name / "tiles.parquet", columns=["id"])["id"].to_pylist()
    rows: list[dict[str, Any]] = [files.to_record(image) for image in tiles(map(int, ids), math.isqrt(records))]
    write_segment(root, name, rows, [], np.empty((len(rows), 1), np.float16), np.empty((len(rows), 1, 1), np.float16))
    for path in (today / name).glob("*.npy"):
        link = root / path.relative_to(today)
        link.unlink(missing_ok=True)
        os.link(path, link)
    written, known = (json.loads((folder / name / "segment.json").read_text()) for folder in (root, today))
    written["files"] |= {file: sums for file, sums in known["files"].items() if file.endswith(".npy")}
    (root / name / "segment.json").write_text(json.dumps(written) + "\n")


def measure(model: LoadedModel, root: Path, records: int, queries: int) -> dict[str, object]:
    """Bytes by file; milliseconds to open, of 256 random rows, and of queries, the first and the median."""
    sentences = [f"a river beside a village {number}" for number in range(queries + WARM_UP)]
    scorer = KnownTexts(model, sentences)
    known = replace(model, scorer=scorer)
    opened, index = _timed(lambda: ImageIndex(str(root), known))
    trained, _ = _timed(lambda: nearest(index, "ivfpq"))
    loaded, ivfpq = _timed(lambda: nearest(index, "ivfpq"))
    features = torch.cat([scorer.texts(model.tokenizer([text])).feature for text in sentences])
    generator = np.random.default_rng(3)
    rows = [torch.from_numpy(generator.integers(0, records, ROWS)) for _ in range(len(sentences))]
    searchers = {"flat": Searcher(index), "ivfpq": Searcher(index, nearest=ivfpq)}
    answers = {
        "flat_nearest": _queries(features.split(1)[: WARM_UP + 5], lambda feature: scan(index, feature, 256)),
        "ivfpq_nearest": _queries(features.split(1), lambda feature: ivfpq(feature, 256)),
        "random_rows": _queries(rows, lambda some: (index.feature_rows(some), index.projected_rows(some))),
        "ivfpq_and_mscmat": _queries(sentences, lambda text: searchers["ivfpq"].by_text([text])),
        **{
            name: _queries(sentences, lambda text, where=where: searchers["flat"].by_text([text], where=where))
            for name, where in _filters().items()
        },
    }
    exact, found = scan(index, features[:WARM_UP], 10)[1], ivfpq(features[:WARM_UP], 256)[1]
    return {
        "format": FORMAT,
        "records": records,
        "bytes": _sizes(root),
        "open_ms": opened,
        "ivfpq_build_ms": trained,
        "ivfpq_open_ms": loaded,
        "query_ms": answers,
        "exact_top_10_among_256": round(float((exact[:, :, None] == found[:, None]).any(2).double().mean()), 4),
    }


def _queries(inputs: Sequence[Any], call: Callable[[Any], object]) -> dict[str, float]:
    first, _ = _timed(lambda: call(inputs[0]))
    return {"first": first["clock"], "cpu_first": first["cpu"], **timings(inputs, call)}


def _timed(call: Callable[[], T]) -> tuple[dict[str, float], T]:
    """Milliseconds of a call on the clock and of the processor, and its result."""
    start, cpu_start = time.perf_counter(), time.process_time()
    result = call()
    clock, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    return {"clock": round(1e3 * clock, 1), "cpu": round(1e3 * cpu, 1)}, result


def _filters() -> dict[str, SearchFilter]:
    """A box, and a condition where the format knows conditions."""
    if {field.name for field in fields(SearchFilter)} >= {"bbox", "where"}:
        return {"bbox": SearchFilter(bbox=BOX), "where": SearchFilter(where=CONDITION)}
    return {"bbox": SearchFilter(box=BOX)}


def _sizes(root: Path) -> dict[str, int]:
    """Bytes of all files of a name."""
    sizes: dict[str, int] = {}
    for path in (path for path in root.rglob("*") if path.is_file()):
        name = path.suffix if path.suffix == ".faiss" else path.name
        sizes[name] = sizes.get(name, 0) + path.stat().st_size
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="MSA-ViT-B")
    parser.add_argument("--records", type=int, nargs="+", default=[100_000])
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scratch", required=True, type=Path, help="folder that keeps the indexes")
    parser.add_argument("--out")
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    torch.manual_seed(0)  # the same weights in every call
    model = load(f"{parsed.model}=untrained")
    rows = []
    for records in parsed.records:
        root, written_s = build(model, records, parsed.scratch)
        rows.append({"write_s": written_s, **measure(model, root, records, parsed.queries)})
        print(json.dumps(rows[-1]), flush=True)
    if parsed.out:
        write_result(parsed.out, rows, model=parsed.model)


if __name__ == "__main__":
    main()
