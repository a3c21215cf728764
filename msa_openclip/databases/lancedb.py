"""LanceDB: an index or partitions as a table, and a reranker of its own kind that scores what a query has found.

    table = write_table(lancedb.connect("archive"), "tiles", ["tiles.index"])
    reranker, text = MatchReranker(model, k=10), "a flooded river"
    query = table.search(reranker.vector(text), vector_column_name="global").limit(256)
    for row in query.rerank(reranker, text).to_list():
        print(row["_relevance_score"], row["id"])

Needs the extra `lancedb`.  Shapes: E embed_dim.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..evaluation.loading import LoadedModel
from ..search.exchange import check_product
from ..search.files import ImageIndexError, Manifest
from ..search.schema import SchemaError, product_of
from ..search.tiles import in_schema
from .rescoring import SCORE, DatabaseError, Rescorer
from .sources import Sources

try:
    from lancedb.rerankers import Reranker
except ImportError as error:
    raise ImportError("LanceDB is missing: pip install 'msa_openclip[lancedb]'.") from error

_log = logging.getLogger(__name__)
_RELEVANCE = "_relevance_score"  # the column by which LanceDB knows what a reranker has done
_DISTANCES = ("_distance", "_score")  # of vector and full-text queries


def write_table(connection: Any, name: str, sources: Sequence[str]) -> Any:
    """Write indexes and GeoParquet files to a table, in one transaction; a table that is there gets the rows it lacks.

    Args:
        connection: of `lancedb.connect`: a folder or an object store.
        name: of the table.
        sources: folders of indexes; Parquet files of `index export` or `embed`, folders of them or patterns.
    Returns:
        The table of LanceDB; its columns are those of the files, the vectors are `global` and `match`.
    Raises:
        ImageIndexError: a source is damaged, or of another model than the first, or than the table.
        DatabaseError: the table that is there is none of this function, or lacks a column of the sources.
    """
    rows = Sources(sources)
    table = _open(connection, name)
    known: set[tuple[str, str]] = set()
    schema = rows.schema
    if table is not None:
        _check_table(table, name, rows)
        schema = table.schema
        there = table.search().select(["id", "content"]).to_batches()
        known = {image for batch in there for image in _identities(batch)}
    reader = _Reader(rows, known, schema)
    try:
        if table is None:
            table = connection.create_table(name, reader.stream())
        else:
            table.add(reader.stream())
    except Exception as error:
        # LanceDB hands what our rows raise on as text, with a traceback in it.
        raise reader.failure or error from error
    if reader.passed_over:
        _log.warning(
            "table %s: %d rows are in it already, or came twice, and are passed over.", name, reader.passed_over
        )
    return table


class MatchReranker(Reranker):
    """Orders what a query of LanceDB has found by MSCMAT's exact scores, fused with the cosine.

    The query's `limit` is the number of candidates.  Rows keep their columns and get `_relevance_score`, `cosine` and
    `match_scales`.

    Args:
        model: the model that made the vectors.
        k: how many rows to keep; by default all candidates.
        return_score: `relevance`, or `all` to keep LanceDB's own distances, too.
    """

    def __init__(self, model: LoadedModel, k: int | None = None, return_score: str = "relevance") -> None:
        super().__init__(return_score)
        if k is not None and k < 1:
            raise DatabaseError(f"k: {k} must be at least 1.")
        self._rescorer, self._k = Rescorer(model), k

    def vector(self, text: str) -> NDArray[np.float32]:
        """The normalised global feature (E) of a text, to be given to `table.search`."""
        return self._rescorer.vector(text)

    def rerank_vector(self, query: str, vector_results: pa.Table) -> pa.Table:
        """Called by LanceDB on the answers of a vector query."""
        best = self._rescorer.best(query, vector_results, self._k)
        kept = best if self.score == "all" else best.drop_columns([n for n in _DISTANCES if n in best.column_names])
        return kept.rename_columns([_RELEVANCE if name == SCORE else name for name in kept.column_names])

    def rerank_fts(self, query: str, fts_results: pa.Table) -> pa.Table:
        """Called by LanceDB on the answers of a full-text query."""
        return self.rerank_vector(query, fts_results)

    def rerank_hybrid(self, query: str, vector_results: pa.Table, fts_results: pa.Table) -> pa.Table:
        """Called by LanceDB on the answers of both kinds of queries, each row of which is scored once."""
        return self.rerank_vector(query, self.merge_results(vector_results, fts_results))


class _Reader:
    """The rows of sources that are not known yet, as batches for LanceDB, and what went wrong with them."""

    def __init__(self, rows: Sources, known: set[tuple[str, str]], schema: pa.Schema) -> None:
        self._rows, self._known, self._schema = rows, known, schema
        self.failure: Exception | None = None
        self.passed_over = 0

    def stream(self) -> pa.RecordBatchReader:
        return pa.RecordBatchReader.from_batches(self._schema, self._batches())

    def _batches(self) -> Iterator[pa.RecordBatch]:
        try:
            for table in self._rows.tables():
                yield from in_schema(self._fresh(table), self._schema).to_batches()
        except Exception as error:
            self.failure = error
            raise

    def _fresh(self, table: pa.Table) -> pa.Table:
        """The rows whose id and content are not known; they are from now on."""
        rows = []
        for row, image in enumerate(_identities(table)):
            if image not in self._known:
                self._known.add(image)
                rows.append(row)
        self.passed_over += len(table) - len(rows)
        return table.take(pa.array(rows, pa.int64()))


def _open(connection: Any, name: str) -> Any:
    """A table, or None; a listing would also name tables whose first writer was killed."""
    try:
        return connection.open_table(name)
    except ValueError as error:
        if "not found" in str(error):
            return None
        raise


def _check_table(table: Any, name: str, rows: Sources) -> None:
    try:
        there = product_of(table.schema, f"table {name}")
    except SchemaError as error:
        raise DatabaseError(f"{error} Or choose another name for the table.") from error
    manifest = Manifest(there.model, there.fingerprint, there.settings)
    try:
        check_product("the sources", rows.product, manifest, there)
    except ImageIndexError as error:
        raise ImageIndexError(f"table {name}: {error}") from error
    missing = [field.name for field in rows.schema if field.name not in table.schema.names]
    if missing:
        raise DatabaseError(
            f"table {name}: no column {', '.join(missing)}, which the sources have; add it with `add_columns` of the "
            "table, or write a new table from all sources."
        )


def _identities(rows: Any) -> list[tuple[str, str]]:
    """Id and content of each row of a table or batch, by which an index knows an image."""
    content = (text or "" for text in rows["content"].to_pylist())
    return list(zip(rows["id"].to_pylist(), content, strict=True))
