"""The code of docs/how-to/databases.md runs as it stands there, and its answers are those of our own search."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.markdown import python_blocks

from msa_openclip.evaluation.loading import LoadedModel
from msa_openclip.search.exchange import export_index
from msa_openclip.search.filters import SearchFilter
from msa_openclip.search.index import ImageIndex
from msa_openclip.search.searcher import Searcher

Run = Callable[..., list[list[str]]]
PAGE = Path(__file__).parents[2] / "docs/how-to/databases.md"


@pytest.fixture
def run(
    index: str, model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Runs a section beside `tiles.index` and its export `parts`; returns what it prints, split at blanks."""
    shutil.copytree(index, tmp_path / "tiles.index")
    export_index(index, str(tmp_path / "parts"))
    monkeypatch.chdir(tmp_path)

    def section(title: str, **changes: str) -> list[list[str]]:
        text = re.search(rf"^## {title}$(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        assert text
        code = "\n".join(python_blocks(text[1])).replace("MSA-ViT-B=epoch_9.pt", model.spec)
        for there, here in changes.items():
            assert there in code
            code = code.replace(there, here)
        exec(compile(code, f"{PAGE.name}, {title}", "exec"), {})
        return [line.split() for line in capsys.readouterr().out.splitlines()]

    return section


@pytest.fixture
def expected(index: str, model: LoadedModel) -> list[tuple[float, str]]:
    where = SearchFilter(bbox=(12, 50, 14, 52), since="2012")
    (hits,) = Searcher(ImageIndex(index, model)).by_text(["a flooded river"], where=where)
    assert len(hits) == 3
    return [(hit.score, hit.image.image_id) for hit in hits if hit.image]


def expect(printed: list[list[str]], expected: list[tuple[float, str]]) -> None:
    assert [line[1] for line in printed] == [name for _, name in expected]
    assert [float(line[0]) for line in printed] == pytest.approx([score for score, _ in expected], rel=1e-5)


def test_lancedb(run: Run, expected: list[tuple[float, str]]) -> None:
    pytest.importorskip("lancedb", reason="lancedb (extra lancedb) is not installed")
    expect(run("LanceDB"), expected)


@pytest.fixture
def postgres() -> str:
    """URL of a server with pgvector, without what the page makes there."""
    psycopg = pytest.importorskip("psycopg", reason="psycopg (extra test) is not installed")
    pytest.importorskip("pgvector", reason="pgvector (extra test) is not installed")
    url = os.environ.get("MSA_OPENCLIP_TEST_POSTGRES")
    if not url:
        pytest.skip("MSA_OPENCLIP_TEST_POSTGRES names no server with pgvector (postgresql://user@host:port/database)")
    with psycopg.connect(url, autocommit=True) as db:
        db.execute("drop table if exists tiles, tile_vectors")
    return url


def test_pgvector(run: Run, expected: list[tuple[float, str]], postgres: str) -> None:
    expect(run("Postgres with pgvector", **{"postgresql://postgres@127.0.0.1/postgres": postgres}), expected)


def test_pgstac(run: Run, expected: list[tuple[float, str]], postgres: str) -> None:
    pytest.importorskip("pypgstac", reason="pypgstac is not installed")
    import psycopg
    from pypgstac.db import PgstacDB
    from pypgstac.migrate import Migrate

    with psycopg.connect(postgres) as db:
        if not db.execute("select 1 from pg_available_extensions where name = 'postgis'").fetchone():
            pytest.skip("the server has no PostGIS")
    with PgstacDB(dsn=postgres) as catalogue:
        Migrate(catalogue).run_migration()
    expect(run("pgSTAC", **{"postgresql://postgres@127.0.0.1/postgres": postgres}), expected)


def test_qdrant(run: Run, expected: list[tuple[float, str]]) -> None:
    pytest.importorskip("qdrant_client", reason="qdrant-client (extra test) is not installed")
    expect(run("Qdrant"), expected)
