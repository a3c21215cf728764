"""Two-stage search in several engines, side by side in one run: recall against exhaustive ranking, milliseconds, bytes.

    python benchmarks/engines.py MSA-ViT-B=epoch_9.pt real.index --captions dataset_rsicd.json --split val \\
        --records 100000 --scratch FOLDER --postgres postgresql://postgres@127.0.0.1/postgres \\
        --plaid-python plaid/bin/python --out docs/results/engines.json

`real.index` holds real images of a trained model.  Its vectors are blown up to the wanted number: behind the real ones,
each record is a mixture of two real images that lie near each other (weight 0.5 to 1, one of the eight nearest), with
noise of a tenth of the deviation, global feature and MSCMAT's vectors alike.  Queries are captions of the split.

Every engine finds K candidates by their global features and hands over their vectors; the exact scores are computed by
the same code.  Recall is the share of the top 10 of the exhaustive fused ranking of all records.  The text tower is not
in the times.  The ColBERT-style engine has no vectors of this model: `engines_plaid.py`, which is run from here, says
what it gets.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from retrieval_common import WARM_UP, write_result

from msa_openclip.data.captioned import CaptionedImage
from msa_openclip.data.readers import read_captions
from msa_openclip.evaluation.loading import LoadedModel, load
from msa_openclip.evaluation.scorer import EncodedTexts
from msa_openclip.search.files import Manifest, read_manifest, read_segment, write_manifest, write_segment
from msa_openclip.search.index import ImageIndex
from msa_openclip.search.nearest import nearest
from msa_openclip.search.schema import to_table
from msa_openclip.shards.records import Location

T = TypeVar("T")
SEGMENT, BLOCK, TOP = 10_000, 2_048, 10
Candidates = tuple[NDArray[np.int64], torch.Tensor, torch.Tensor]
"""Rows (K), global features (K, E), MSCMAT's vectors (K, S, D)."""
Find = Callable[[NDArray[np.float32]], Candidates]


@dataclass(frozen=True)
class Engine:
    """How to find candidates, and what it costs to keep them."""

    name: str
    setting: str
    build_s: float
    bytes: int
    """On disk, all columns included."""
    find: Find
    server: int | None = None
    """The process that answers, if it is another one."""


def blown_up(index: ImageIndex, count: int, first: int) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    """Features (n, E) and vectors m (n, S, D) of records `first` to `first + count`."""
    known = torch.arange(len(index))
    features, projected = index.feature_rows(known), index.projected_rows(known)
    assert projected is not None
    near = torch.cat([(part @ features.T).topk(9, dim=1).indices[:, 1:] for part in features.split(BLOCK)])
    generator = torch.Generator().manual_seed(first)
    rows = torch.arange(first, first + count)
    real = rows < len(index)
    one = torch.where(real, rows, torch.randint(len(index), (count,), generator=generator))
    other = near[one, torch.randint(8, (count,), generator=generator)]
    weight = torch.where(real, 1.0, 0.5 + 0.5 * torch.rand(count, generator=generator))
    halves = []
    for values in (features, projected):
        shaped = weight.view(-1, *[1] * (values.dim() - 1))
        noise = torch.randn(count, *values.shape[1:], generator=generator) * values.std(dim=0) / 10
        mixed = shaped * values[one] + (1 - shaped) * values[other] + noise * (shaped < 1)
        mixed = mixed / mixed.norm(dim=-1, keepdim=True) if values is features else mixed
        halves.append(mixed.half().numpy())
    return halves[0], halves[1]


def write_index(real: ImageIndex, records: int, root: Path) -> None:
    """An index of so many records, named by their row."""
    known = read_manifest(Path(real.folder))
    manifest = Manifest(known.model, known.fingerprint, known.settings)
    root.mkdir(parents=True)
    names = []
    for first in range(0, records, SEGMENT):
        count = min(SEGMENT, records - first)
        images = [CaptionedImage(str(first + row), Location("nowhere.tar"), (), None, {}, "") for row in range(count)]
        names.append(f"{first:016x}")
        write_segment(root, names[-1], manifest, to_table(images), *blown_up(real, count, first))
    segments = tuple(read_segment(root, name) for name in names)
    write_manifest(root, Manifest(known.model, known.fingerprint, known.settings, segments))


def own(index: ImageIndex, kind: str, candidates: int) -> Engine:
    """Our own index: memory-mapped vectors, an exact scan or FAISS."""
    start = time.perf_counter()
    finder = nearest(index, kind)
    build_s = time.perf_counter() - start

    def find(vector: NDArray[np.float32]) -> Candidates:
        rows = finder(torch.from_numpy(vector[None]), candidates)[1][0]
        rows = rows[rows >= 0]
        projected = index.projected_rows(rows)
        assert projected is not None
        return rows.numpy(), index.feature_rows(rows), projected

    size = _bytes(Path(index.folder), "*/*") + _bytes(Path(index.folder), f"{kind}-*.faiss")
    setting = "exact scan" if kind == "flat" else "2 sqrt(n) lists, 1/8 probed, E / 4 bytes, refine 4"
    return Engine(f"own index, {kind}", setting, build_s, size, find)


def lance(index: ImageIndex, scratch: Path, candidates: int) -> Iterator[Engine]:
    """LanceDB without an index, then with its IVF-PQ."""
    import lancedb
    from lancedb.index import IvfPq

    from msa_openclip.databases.lancedb import write_table

    start = time.perf_counter()
    table = write_table(lancedb.connect(scratch), "tiles", [index.folder])
    written = time.perf_counter()

    def find(vector: NDArray[np.float32], refine: int = 0) -> Candidates:
        query = table.search(vector, vector_column_name="global").distance_type("cosine").limit(candidates)
        query = query.nprobes(32).refine_factor(refine) if refine else query
        found = query.select(["id", "global", "match", "_distance"]).to_arrow()
        rows = np.array(found["id"].to_pylist(), dtype=np.int64)
        return rows, _halves(found["global"], len(rows)), _halves(found["match"], len(rows), index.model.scorer.scales)

    yield Engine("LanceDB, no index", "exact scan", written - start, _bytes(scratch, "**/*"), find)
    table.create_index("global", config=IvfPq(distance_type="cosine", max_iterations=10))
    built = time.perf_counter() - start
    size = _bytes(scratch, "**/*")
    for refine in (4, 16):
        setting = f"sqrt(n) lists, 32 probed, E / 16 bytes, refine {refine}, 10 iterations"
        yield Engine("LanceDB, IVF-PQ", setting, built, size, partial(find, refine=refine))


def postgres(index: ImageIndex, url: str, candidates: int) -> Iterator[Engine]:
    """pgvector: halfvec, HNSW on the global features; it looks at twice the candidates, then as far as it can."""
    import psycopg
    from pgvector import HalfVector
    from pgvector.psycopg import register_vector

    start = time.perf_counter()
    db = psycopg.connect(url, autocommit=True)
    db.execute("create extension if not exists vector")
    register_vector(db)
    width, scales = next(index.features())[1].shape[1], index.model.scorer.scales
    projected = index.projected_rows(torch.arange(1))
    assert projected is not None
    db.execute("drop table if exists engines_tiles")
    vectors = f"global halfvec({width}), match halfvec({projected[0].numel()})"
    db.execute(f"create table engines_tiles (id int primary key, {vectors})")
    with db.cursor() as cursor, cursor.copy("copy engines_tiles from stdin with (format binary)") as copy:
        copy.set_types(["int4", "halfvec", "halfvec"])
        for first, features in index.features():
            rows = torch.arange(first, first + len(features))
            match = index.projected_rows(rows)
            assert match is not None
            for row, one, other in zip(rows.tolist(), features.numpy(), match.flatten(1).numpy(), strict=True):
                copy.write_row((row, HalfVector(one), HalfVector(other)))
    db.execute("set maintenance_work_mem = '4GB'")  # the graph is built in memory
    db.execute("create index on engines_tiles using hnsw (global halfvec_cosine_ops)")
    db.execute("analyze engines_tiles")
    build_s = time.perf_counter() - start
    (size,) = db.execute("select pg_total_relation_size('engines_tiles')").fetchone() or (0,)
    ask = "select id, global, match from engines_tiles order by global <=> %s limit %s"

    def find(vector: NDArray[np.float32]) -> Candidates:
        rows = db.execute(ask, (HalfVector(vector), candidates), binary=True).fetchall()
        halves = [torch.from_numpy(np.stack([row[n].to_numpy() for row in rows]).astype(np.float32)) for n in (1, 2)]
        return np.array([row[0] for row in rows]), halves[0], halves[1].unflatten(1, (scales, -1))

    for ef_search in (2 * candidates, 1000):
        db.execute(f"set hnsw.ef_search = {ef_search}")
        setting = f"m 16, ef_construction 64, ef_search {ef_search}"
        yield Engine("pgvector, HNSW", setting, build_s, size, find, db.info.backend_pid)


def _halves(column: Any, rows: int, *shape: int) -> torch.Tensor:
    values = torch.from_numpy(np.asarray(column.combine_chunks().flatten()).astype(np.float32))
    return values.view(rows, *shape, -1)


def _bytes(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern) if path.is_file())


def exhaustive(index: ImageIndex, texts: EncodedTexts) -> NDArray[np.int64]:
    """The rows (Q, 10) of the best fused scores among all records; untimed, so on all cores that it may use."""
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    scorer = index.model.scorer
    main = scorer.rankings.index(scorer.main_ranking)
    scores = []
    for first, features in index.features():
        projected = index.projected_rows(torch.arange(first, first + len(features)))
        scores.append(scorer.scores(scorer.fold(features, projected), texts)[main])
    torch.set_num_threads(threads)
    best: NDArray[np.int64] = torch.cat(scores).topk(TOP, dim=0).indices.T.numpy()
    return best


def asked(path: str, split: str, real: ImageIndex, count: int) -> list[str]:
    """First captions of indexed images of a split, spread over it."""
    known = {image.image_id for image in real.images}
    images = read_captions(path, str(Path(path).parent / "images"), split=split)
    captions = list(dict.fromkeys(image.captions[0] for image in images if image.image_id in known))
    return [captions[number] for number in np.linspace(0, len(captions) - 1, count).astype(int)]


def spent(inputs: Sequence[T], call: Callable[[T], object], server: int | None = None) -> dict[str, float]:
    """Milliseconds of single calls: median and least on the clock, mean on the processor, a server's included.

    On a machine with other work the clock counts what waiting costs, the processor does not.
    """
    clock, before = [], 0.0
    for number, one in enumerate(inputs):
        if number == WARM_UP:
            before = _processor_s(server)
        start = time.perf_counter()
        call(one)
        clock.append(1e3 * (time.perf_counter() - start))
    mean = 1e3 * (_processor_s(server) - before) / (len(inputs) - WARM_UP)
    timed = clock[WARM_UP:]
    return {"p50": round(statistics.median(timed), 2), "least": round(min(timed), 2), "processor": round(mean, 2)}


def _processor_s(server: int | None) -> float:
    """Processor seconds of this process, all threads, and of a server's, which Linux counts in hundredths."""
    if server is None:
        return time.process_time()
    fields = Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()
    return time.process_time() + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(
    engine: Engine, model: LoadedModel, captions: list[str], best: NDArray[np.int64], records: int
) -> dict[str, Any]:
    """Recall of the two stages, and milliseconds of each."""
    scorer = model.scorer
    encoded = [scorer.texts(model.tokenizer([caption])) for caption in captions]
    main = scorer.rankings.index(scorer.main_ranking)
    vectors = [text.feature[0].numpy() for text in encoded]
    found = [engine.find(vector) for vector in vectors]

    def top(number: int) -> NDArray[np.int64]:
        rows, features, projected = found[number]
        scores = scorer.scores(scorer.fold(features, projected), encoded[number])[main, :, 0]
        return rows[scores.argsort(descending=True)[:TOP].numpy()]

    recalls = [len(set(top(n).tolist()) & set(row.tolist())) / TOP for n, row in enumerate(best)]
    return {
        "engine": engine.name,
        "setting": engine.setting,
        "records": records,
        "recall_at_10": round(float(np.mean(recalls)), 4),
        "find_ms": spent(vectors, engine.find, engine.server),
        "scores_ms": spent(range(len(captions)), top),
        "build_s": round(engine.build_s, 1),
        "bytes_per_image": round(engine.bytes / records),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("index", help="of real images")
    parser.add_argument("--captions", required=True)
    parser.add_argument("--split", default="val")
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--candidates", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scratch", required=True)
    parser.add_argument("--postgres", help="URL of a server with pgvector")
    parser.add_argument("--plaid-python", help="a Python that has fast-plaid, which wants a torch of its own")
    parser.add_argument("--plaid-records", type=int, default=10_000)
    parser.add_argument("--plaid-tokens", type=int, default=49, help="an image (default: %(default)s)")
    parser.add_argument("--out", required=True)
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    model, root = load(parsed.model), Path(parsed.scratch) / f"own-{parsed.records}"
    real = ImageIndex(parsed.index, model)
    if not (root / "index.json").exists():
        shutil.rmtree(root, ignore_errors=True)
        write_index(real, parsed.records, root)
    index = ImageIndex(str(root), model)
    captions = asked(parsed.captions, parsed.split, real, parsed.queries + WARM_UP)
    best = exhaustive(index, model.scorer.texts(model.tokenizer(captions)))
    for path in root.rglob("*.npy"):
        path.read_bytes()  # into the page cache
    rows = []
    tower = spent(captions, lambda caption: model.scorer.texts(model.tokenizer([caption])))

    versions = {name: _version(name) for name in ("lancedb", "faiss-cpu", "psycopg", "pgvector")}
    setting = {"candidates": parsed.candidates, "real_images": len(real), "queries": parsed.queries}

    def add(row: dict[str, Any]) -> None:
        rows.append(row | {"load_average_1_min": round(os.getloadavg()[0], 2)})
        print(json.dumps(rows[-1]), flush=True)
        name = parsed.model.split("=")[0]
        write_result(parsed.out, rows, model=name, versions=versions, text_tower_ms=tower, **setting)

    def compare(engine: Engine) -> None:
        add(measure(engine, model, captions, best, parsed.records))

    for kind in ("flat", "ivfpq"):
        compare(own(index, kind, parsed.candidates))
    shutil.rmtree(scratch := Path(parsed.scratch) / "lance", ignore_errors=True)
    for engine in lance(index, scratch, parsed.candidates):
        compare(engine)
    if parsed.postgres:
        for engine in postgres(index, parsed.postgres, parsed.candidates):
            compare(engine)
    if parsed.plaid_python:
        script = Path(__file__).with_name("engines_plaid.py")
        sizes = [str(parsed.plaid_records), str(parsed.plaid_tokens)]
        call = [parsed.plaid_python, str(script), str(Path(parsed.scratch) / "-".join(["plaid", *sizes])), *sizes]
        done = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True)
        add(json.loads(done.stdout.splitlines()[-1]))


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
