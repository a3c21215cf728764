"""Rows for a table of a database: segments of indexes and GeoParquet partitions, all of one model, in one schema.

    sources = Sources(["tiles.index", "parts/*.parquet"])
    for table in sources.tables():
        ...                          # of sources.schema, whose metadata tells the model

Shapes: n rows, S scales, D width of MSCMAT, E embed_dim.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..search.exchange import check_product, expand, read_product, read_tables, segment_table
from ..search.files import TILES, ImageIndexError, Manifest, Segment, checked_files, open_parquet, read_manifest
from ..search.options import SEGMENT_IMAGES
from ..search.schema import COLUMNS, VECTORS, Product, SchemaError, conform, product_of, vectors, with_vectors
from ..search.tiles import in_schema, united
from ..shards.storage import store


@dataclass(frozen=True)
class _Piece:
    """A file of rows, not read yet."""

    name: str
    product: Product
    columns: pa.Schema
    read: Callable[[], Iterator[pa.Table]]


class Sources:
    """Indexes and GeoParquet files, opened; their rows have the columns of `search.schema`, vectors included.

    Args:
        names: folders of indexes; Parquet files, folders of them or patterns, local or fsspec URLs.
    Raises:
        ImageIndexError: one of them is none, damaged, or of another model than the first.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._pieces = [piece for name in names for piece in _pieces(name)]
        if not self._pieces:
            raise ImageIndexError(f"{', '.join(names) or 'no sources'}: there is no row with vectors.")
        self.product = self._pieces[0].product
        """What the vectors are."""
        for piece in self._pieces:
            self._check(piece)
        width = {"global": self.product.embed_dim}
        if self.product.match_shape:
            width["match"] = self.product.match_shape[0] * self.product.match_shape[1]
        extra = united(piece.columns for piece in self._pieces)
        self.schema = pa.schema(
            [*COLUMNS, *(field for field in extra if field.name not in {*COLUMNS.names, *VECTORS})]
            + [(name, pa.list_(pa.float16(), numbers)) for name, numbers in width.items()],
            metadata={"msa_openclip": json.dumps(asdict(self.product))},
        )
        """The columns of all of them; the key `msa_openclip` of the metadata holds `product`."""

    def _check(self, piece: _Piece) -> None:
        first = self.product
        check_product(piece.name, piece.product, Manifest(first.model, first.fingerprint, first.settings), first)

    def tables(self) -> Iterator[pa.Table]:
        """All rows in the order of the sources, a few thousand at a time, each table of `schema`."""
        for piece in self._pieces:
            for table in piece.read():
                yield self._in_schema(table, piece.name)

    def _in_schema(self, table: pa.Table, name: str) -> pa.Table:
        try:
            halves = vectors(table, self.product)
        except SchemaError as error:
            raise ImageIndexError(f"{name}: {error}.") from error
        known = conform(table.select([name for name in table.column_names if name not in VECTORS]))
        return in_schema(with_vectors(known, *halves), self.schema)


def _pieces(name: str) -> Iterator[_Piece]:
    if store.is_local(name) and (Path(store.local_path(name)) / "index.json").exists():
        yield from _segments(Path(store.local_path(name)))
        return
    for url in expand([name]):
        yield _Piece(url, *_read_schema(url), partial(read_tables, url, SEGMENT_IMAGES))


def _read_schema(url: str) -> tuple[Product, pa.Schema]:
    product = read_product(url)
    with store.open_read(url) as file:
        return product, pq.read_schema(file)


def _segments(root: Path) -> Iterator[_Piece]:
    manifest = read_manifest(root)
    for segment in manifest.segments:
        if not segment.images:
            continue
        path = root / segment.name
        columns = open_parquet(path, checked_files(root, segment)[TILES]).schema_arrow
        yield _Piece(str(path), product_of(columns, str(path)), columns, _reader(root, manifest, segment))


def _reader(root: Path, manifest: Manifest, segment: Segment) -> Callable[[], Iterator[pa.Table]]:
    return lambda: iter([segment_table(root, manifest, segment)[0]])
