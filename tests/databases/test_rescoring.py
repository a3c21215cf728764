"""Candidates of databases that give plain rows."""

from __future__ import annotations

import pytest

from msa_openclip.databases.rescoring import DatabaseError, Rescorer, candidates_of
from msa_openclip.databases.sources import Sources
from msa_openclip.evaluation.loading import LoadedModel
from msa_openclip.search.files import ImageIndexError
from msa_openclip.search.index import ImageIndex
from msa_openclip.search.searcher import Searcher

TEXT = "harbor number 3"


def test_plain_rows_are_scored_as_the_index_is(index: str, model: LoadedModel, stranger: LoadedModel) -> None:
    sources = Sources([index])
    described = sources.schema.metadata[b"msa_openclip"].decode()
    rows = [row for table in sources.tables() for row in table.select(["id", "global", "match"]).to_pylist()]
    (hits,) = Searcher(ImageIndex(index, model)).by_text([TEXT], k=4)
    found = Rescorer(model).best(TEXT, candidates_of(rows, described), k=4).to_pylist()
    assert [row["id"] for row in found] == [hit.image.image_id for hit in hits if hit.image]
    assert [row["score"] for row in found] == pytest.approx([hit.score for hit in hits], rel=1e-5, abs=1e-5)
    assert Rescorer(model).best(TEXT, candidates_of([], described)).to_pylist() == []
    with pytest.raises(ImageIndexError, match="candidates: built with other weights"):
        Rescorer(stranger).best(TEXT, candidates_of(rows, described))


def test_rows_without_vectors_are_named(index: str) -> None:
    sources = Sources([index])
    described = sources.schema.metadata[b"msa_openclip"].decode()
    rows = [row for table in sources.tables() for row in table.select(["id", "global"]).to_pylist()]
    with pytest.raises(DatabaseError, match=r"row 0: 0 numbers of `match`, expected \d+; let the query give them"):
        candidates_of(rows, described)
    with pytest.raises(DatabaseError, match="described_by: its metadata has no key `msa_openclip`"):
        candidates_of(rows, "something else")
