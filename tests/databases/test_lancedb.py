"""LanceDB beside our own search: the same answers, in its own form of queries, and refusals that name what is wrong."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

lancedb: Any = pytest.importorskip("lancedb", reason="lancedb (extra lancedb) is not installed")

from databases.conftest import random_model  # noqa: E402
from lancedb.index import FTS  # noqa: E402

from msa_openclip.data.readers import read_shards  # noqa: E402
from msa_openclip.databases.lancedb import MatchReranker, write_table  # noqa: E402
from msa_openclip.databases.rescoring import DatabaseError  # noqa: E402
from msa_openclip.evaluation.loading import LoadedModel  # noqa: E402
from msa_openclip.search.build import build_index  # noqa: E402
from msa_openclip.search.exchange import export_index  # noqa: E402
from msa_openclip.search.files import ImageIndexError  # noqa: E402
from msa_openclip.search.filters import SearchFilter  # noqa: E402
from msa_openclip.search.index import ImageIndex  # noqa: E402
from msa_openclip.search.searcher import Searcher  # noqa: E402

TEXT = "harbor number 3"


@pytest.fixture
def db(tmp_path: Path) -> Any:
    return lancedb.connect(tmp_path / "archive")


@pytest.fixture
def table(db: Any, index: str) -> Any:
    return write_table(db, "tiles", [index])


def query(table: Any, reranker: MatchReranker, candidates: int = 7) -> Any:
    return table.search(reranker.vector(TEXT), vector_column_name="global").limit(candidates).rerank(reranker, TEXT)


def expect_hits(rows: list[dict[str, Any]], hits: list[Any]) -> None:
    assert [row["id"] for row in rows] == [hit.image.image_id for hit in hits]
    for name, values in (
        ("_relevance_score", [hit.score for hit in hits]),
        ("cosine", [hit.cosine for hit in hits]),
        ("match_scales", [hit.match for hit in hits]),
    ):
        np.testing.assert_allclose([row[name] for row in rows], values, rtol=1e-5, atol=1e-6)


def rewritten(path: Path, table: pa.Table) -> None:
    pq.write_table(table.replace_schema_metadata(pq.read_schema(path).metadata), path)


# ---- the same answers


@pytest.mark.parametrize("candidates", [7, 3])
def test_answers_are_those_of_the_searcher(table: Any, index: str, model: LoadedModel, candidates: int) -> None:
    (hits,) = Searcher(ImageIndex(index, model), candidates=candidates).by_text([TEXT], k=3)
    best = query(table, MatchReranker(model, k=3), candidates).to_list()
    expect_hits(best, hits)
    ratios = {round(row["_relevance_score"] / row["cosine"], 2) for row in query(table, MatchReranker(model)).to_list()}
    assert len(ratios) > 1  # MSCMAT has a say: it is not the cosine, scaled


def test_a_filter_of_lancedb_is_one_of_ours(table: Any, index: str, model: LoadedModel) -> None:
    where = SearchFilter(bbox=(12, 50, 14.2, 51), since="2013")
    (hits,) = Searcher(ImageIndex(index, model)).by_text([TEXT], where=where)
    inside = "bbox.xmin <= 14.2 and bbox.xmax >= 12 and datetime >= timestamp '2013-01-01' and cloud > 0"
    rows = query(table, MatchReranker(model)).where(inside).to_list()
    assert len(rows) == 2
    expect_hits(rows, hits)


def test_exported_partitions_give_the_same_table(db: Any, table: Any, index: str, tmp_path: Path) -> None:
    export_index(index, str(tmp_path / "parts"))
    again = write_table(db, "again", [str(tmp_path / "parts")])
    assert again.to_arrow().sort_by("id") == table.to_arrow().sort_by("id")  # files go by name


def test_a_model_without_mscmat_orders_by_cosine(db: Any, scenes: str, tmp_path: Path) -> None:
    plain = random_model(tmp_path, 5, "tiny-ViT")
    build_index(plain, read_shards(scenes), str(tmp_path / "plain.index"))
    rows = query(write_table(db, "plain", [str(tmp_path / "plain.index")]), MatchReranker(plain)).to_list()
    (hits,) = Searcher(ImageIndex(str(tmp_path / "plain.index"), plain)).by_text([TEXT])
    expect_hits(rows, hits)
    assert "match" not in rows[0]


def test_text_and_hybrid_queries_are_scored_too(table: Any, model: LoadedModel) -> None:
    table.create_index("source", config=FTS(base_tokenizer="simple"))
    reranker = MatchReranker(model, return_score="all")
    everything = query(table, reranker).to_list()
    by_vector = {row["id"]: row["_relevance_score"] for row in everything}
    assert "_distance" in everything[0]
    assert "_distance" not in query(table, MatchReranker(model)).to_list()[0]
    fts = table.search("tar", query_type="fts").limit(7).rerank(MatchReranker(model)).to_list()
    hybrid = table.search(query_type="hybrid", vector_column_name="global").vector(reranker.vector(TEXT)).text("tar")
    rows = hybrid.limit(7).rerank(MatchReranker(model)).to_list()
    assert len(fts) == len(rows) == len({row["id"] for row in rows}) == 7
    scores = [row["_relevance_score"] for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert scores != pytest.approx([by_vector[row["id"]] for row in rows])  # the words are those of the text query


def test_nothing_found_is_an_empty_answer(table: Any, model: LoadedModel) -> None:
    found = query(table, MatchReranker(model)).where("id = 'none'").to_arrow()
    assert len(found) == 0
    assert {"id", "_relevance_score", "cosine", "match_scales"} <= set(found.column_names)


def test_on_an_object_store(bucket: str, index: str, model: LoadedModel) -> None:
    table = write_table(lancedb.connect(bucket, storage_options={"allow_http": "true"}), "tiles", [index])
    (hits,) = Searcher(ImageIndex(index, model)).by_text([TEXT])
    expect_hits(query(table, MatchReranker(model)).to_list(), hits)


# ---- rows are there once


def test_rows_are_added_once(
    db: Any, table: Any, index: str, scenes: str, model: LoadedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build_index(model, read_shards(scenes)[:2], str(tmp_path / "other.index"))  # the same images: equal ids and content
    grown = write_table(db, "tiles", [str(tmp_path / "other.index"), index])
    assert grown.count_rows() == table.count_rows() == 7
    assert "table tiles: 9 rows are in it already, or came twice, and are passed over." in caplog.text
    small = write_table(db, "small", [str(tmp_path / "other.index")])
    assert small.count_rows() == 2
    with pytest.raises(DatabaseError, match=r"table small: no column date, cloud, which the sources have; add it"):
        write_table(db, "small", [index])
    small.add_columns({"date": "cast(null as string)", "cloud": "cast(null as bigint)"})
    assert sorted(row["id"] for row in write_table(db, "small", [index]).search().to_list()) == sorted(
        row["id"] for row in table.search().to_list()
    )


def test_an_interrupted_write_leaves_no_rows(db: Any, index: str, tmp_path: Path) -> None:
    export_index(index, str(tmp_path / "parts"))
    first, second = sorted((tmp_path / "parts").iterdir())
    whole = pq.read_table(second)
    nothing = pa.array([None] * len(whole), whole.schema.field("global").type)
    rewritten(second, whole.set_column(whole.column_names.index("global"), "global", nothing))
    problem = rf"{re.escape(str(second))}: column `global`: .* expected \d+ a row\."
    with pytest.raises(ImageIndexError, match=problem):
        write_table(db, "tiles", [str(tmp_path / "parts")])
    assert write_table(db, "tiles", [str(first)]).count_rows() == pq.read_metadata(first).num_rows
    with pytest.raises(ImageIndexError, match=problem):
        write_table(db, "tiles", [str(tmp_path / "parts")])
    rewritten(second, whole)
    assert write_table(db, "tiles", [str(tmp_path / "parts")]).count_rows() == 7


# ---- what is refused


def test_another_model_is_refused(
    db: Any, table: Any, index: str, scenes: str, stranger: LoadedModel, tmp_path: Path
) -> None:
    with pytest.raises(ImageIndexError, match=r"candidates: built with other weights"):
        query(table, MatchReranker(stranger)).to_list()
    build_index(stranger, read_shards(scenes), str(tmp_path / "other.index"))
    with pytest.raises(ImageIndexError, match=r"table tiles: the sources: its vectors are of other weights"):
        write_table(db, "tiles", [str(tmp_path / "other.index")])
    with pytest.raises(ImageIndexError, match=r"its vectors are of other weights"):
        write_table(db, "both", [index, str(tmp_path / "other.index")])
    assert table.count_rows() == 7


def test_candidates_without_what_scoring_needs_are_named(db: Any, table: Any, index: str, model: LoadedModel) -> None:
    reranker = MatchReranker(model)
    with pytest.raises(DatabaseError, match=r"candidates: no column `match`; .* let the query give the columns"):
        query(table, reranker).select(["id", "global", "_distance"]).to_list()
    vectors = table.to_arrow().select(["id", "global", "match"])
    foreign = db.create_table("foreign", vectors.replace_schema_metadata(None))
    with pytest.raises(DatabaseError, match=r"candidates: its metadata has no key `msa_openclip`"):
        query(foreign, reranker).to_list()
    with pytest.raises(DatabaseError, match=r"table foreign: its metadata .* Or choose another name for the table\."):
        write_table(db, "foreign", [index])
    with pytest.raises(DatabaseError, match="the query is blank"):
        reranker.vector(" ")
    with pytest.raises(DatabaseError, match="k: 0 must be at least 1"):
        MatchReranker(model, k=0)


def test_sources_without_rows_are_named(db: Any, tmp_path: Path, index: str) -> None:
    with pytest.raises(ImageIndexError, match="no Parquet file is there"):
        write_table(db, "tiles", [str(tmp_path / "none")])
    with pytest.raises(ImageIndexError, match="no sources: there is no row with vectors"):
        write_table(db, "tiles", [])
    shutil.copytree(index, tmp_path / "damaged.index")
    (segment, *_) = (tmp_path / "damaged.index").glob("*/features.npy")
    segment.write_bytes(segment.read_bytes()[:-1] + b"\0")
    with pytest.raises(ImageIndexError, match=r"damaged \(features\.npy"):
        write_table(db, "tiles", [str(tmp_path / "damaged.index")])
