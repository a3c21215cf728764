"""Parquet that anybody may have written, imported: taken as it is meant, or refused on one line that names the file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.retrieval_data import square

from msa_openclip.data.captioned import CaptionedImage
from msa_openclip.search.exchange import export_index, import_partitions
from msa_openclip.search.files import TILES, ImageIndexError, checked_files, read_manifest, segment_extent
from msa_openclip.search.filters import SearchFilter
from msa_openclip.search.schema import COLUMNS, Product, parquet, to_table, with_vectors
from msa_openclip.search.tiles import Tiles
from msa_openclip.search.verify import verify_index
from msa_openclip.shards.records import Location

shapely = pytest.importorskip("shapely", reason="shapely (extra archive) is not installed")

ROWS, WIDTH = 5, 4
PRODUCT = Product(model="MSA-x=y.pt", fingerprint="ab" * 32, embed_dim=WIDTH, match_shape=(2, 3))


def whole() -> pa.Table:
    """Five tiles, side by side, with unit vectors."""
    images = [
        CaptionedImage(
            f"i{n}",
            Location(f"{n}.tif", window=(0, 0, n + 1, 5)),
            ("a lake",),
            label="water",
            content=f"c{n}",
            metadata={"geo": {"footprint": square(n, 0)}, "meta": {"date": "2020", "cloud": n}},
        )
        for n in range(ROWS)
    ]
    vectors = np.full((ROWS, WIDTH), 0.5, np.float16)
    return with_vectors(to_table(images), vectors, np.ones((ROWS, 2, 3), np.float16))


def write(
    path: Path, columns: dict[str, pa.Array | None], metadata: dict[bytes, bytes] | None = None, **product: Any
) -> None:
    """The five tiles with other columns (None: without them), or with another product in the metadata."""
    table = whole()
    known = dict(pq.read_schema(pa.BufferReader(parquet(table, PRODUCT))).metadata)
    known[b"msa_openclip"] = json.dumps(json.loads(known[b"msa_openclip"]) | product).encode()
    for name, column in columns.items():
        if name in table.column_names:
            table = table.drop_columns([name])
        table = table if column is None else table.append_column(name, column)
    pq.write_table(table.replace_schema_metadata(metadata if metadata is not None else known), path)


def collections(levels: int) -> bytes:
    """WKB of a point in a collection in a collection, ..."""
    return b"\x01\x07\x00\x00\x00\x01\x00\x00\x00" * levels + bytes(shapely.to_wkb(shapely.Point(1, 1)))


def first(value: Any, kind: pa.DataType | None = None) -> pa.Array:
    return pa.array([value] + [None] * (ROWS - 1), kind)


def lists(values: list[Any], kind: pa.DataType | None = None) -> pa.Array:
    return pa.array(values, pa.list_(kind or pa.float32()))


REFUSED: dict[str, tuple[dict[str, pa.Array | None], str]] = {
    "id missing": ({"id": None}, "no column `id`"),
    "id null": ({"id": pa.array(["a", None, "c", "d", "e"])}, "column `id`: null in 1 rows"),
    "id not UTF-8": ({"id": pa.array([b"\xff\xfe", b"b", b"c", b"d", b"e"])}, "column `id`: Invalid UTF8"),
    "id lone surrogate": ({"id": pa.array([b"\xed\xb0\x80", b"b", b"c", b"d", b"e"])}, "column `id`: Invalid UTF8"),
    "metadata deep": ({"metadata": first("[" * 9000 + "]" * 9000)}, "a row is not what a partition holds"),
    "metadata list": ({"metadata": first("[1]")}, "a row is not what a partition holds"),
    "metadata digits": ({"metadata": first('{"x": ' + "9" * 5000 + "}")}, "a row is not what a partition holds"),
    "outline no WKB": ({"geometry": first(b"x")}, "column `geometry`: an outline is no WKB"),
    "outline counts": ({"geometry": first(b"\x01\x02\x00\x00\x00\xff\xff\xff\x7f")}, "column `geometry`: an outline"),
    "outline nested": ({"geometry": first(collections(100_000))}, r"column `geometry`: .*900,021 bytes of WKB"),
    "outline far off": ({"geometry": first(shapely.to_wkb(shapely.box(500, 1, 501, 2)))}, "expected WGS84"),
    "captions nested": ({"captions": pa.array([[["a"]]] * ROWS)}, "column `captions`"),
    "window of texts": ({"window": pa.array(["x"] * ROWS)}, "column `window` is string"),
    "window large": (
        {"window": pa.array([{"col_off": 2**40, "row_off": 0, "width": 1, "height": 1}] * ROWS)},
        "column `window`: .*not in range",
    ),
    "no time": ({"datetime": first("soon")}, "column `datetime`: Failed to parse"),
    "time beyond years": (
        {"datetime": pa.array([2**62] * ROWS, pa.int64()).cast(COLUMNS.field("datetime").type)},
        "OverflowError",
    ),
    "global missing": ({"global": None}, "no column `global`; expected 4 numbers a row"),
    "global NaN": ({"global": lists([[float("nan")] * 4] * ROWS)}, "float16 cannot hold"),
    "global infinite": ({"global": lists([[1e30] * 4] * ROWS)}, "float16 cannot hold"),
    "global zero": ({"global": lists([[0.0] * 4] * ROWS)}, "a vector of length 0, expected 1"),
    "global long": ({"global": lists([[0.5] * 4] * 4 + [[9.0] * 4])}, "a vector of length 18, expected 1"),
    "global wide": ({"global": lists([[0.5] * 5] * ROWS)}, "25 numbers in 5 rows, expected 4 a row"),
    "global ragged": ({"global": lists([[0.5] * 4] * 3 + [[0.5] * 3, [0.5] * 5])}, "expected 4 a row"),
    "global null": ({"global": lists([[0.5] * 4] * 4 + [None])}, "expected 4 a row"),
    "global null within": ({"global": lists([[0.5] * 4] * 4 + [[None, 1, 0, 0]])}, "float16 cannot hold"),
    "global texts": ({"global": pa.array([["x"] * 4] * ROWS)}, r"column `global` is list<.*string>, expected lists of"),
    "global bytes": ({"global": pa.array([b"12345678"] * ROWS)}, "column `global` is binary, expected lists of"),
    "global numbers": ({"global": pa.array([1.0] * ROWS)}, "column `global` is double, expected lists of"),
    "global nested": ({"global": pa.array([[[1.0]] * 4] * ROWS)}, "expected lists of floating-point"),
    "global fields": ({"global": pa.array([{"a": 1}] * ROWS)}, "expected lists of floating-point"),
    "match missing": ({"match": None}, "no column `match`; expected 6 numbers a row"),
}


@pytest.mark.parametrize(("columns", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_partition_is_named(columns: dict[str, pa.Array | None], message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    write(path, columns)
    with pytest.raises(ImageIndexError, match=message) as caught:
        import_partitions(str(tmp_path / "index"), [str(path)])
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "product",
    [
        {"embed_dim": 10**30},
        {"embed_dim": 0},
        {"embed_dim": -4},
        {"embed_dim": float("inf")},
        {"match_shape": [2**40, 2**40]},
        {"match_shape": [-2, -3]},
        {"settings": [1]},
    ],
)
def test_shapes_that_are_none_are_named(product: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path / "p.parquet", {}, **product)
    with pytest.raises(ImageIndexError, match=r"p\.parquet: .*no key `msa_openclip` that tells"):
        import_partitions(str(tmp_path / "index"), [str(tmp_path / "p.parquet")])


@pytest.mark.parametrize("known", [b"\xff", b"[1]", b'{"settings": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"])
def test_metadata_that_is_none_is_named(known: bytes, tmp_path: Path) -> None:
    write(tmp_path / "p.parquet", {}, {b"msa_openclip": known})
    with pytest.raises(ImageIndexError, match=r"p\.parquet: .*no key `msa_openclip` that tells"):
        import_partitions(str(tmp_path / "index"), [str(tmp_path / "p.parquet")])


def test_a_pipe_is_refused_unopened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.parquet")
    with pytest.raises(ImageIndexError, match=r"p\.parquet: not a regular file but a pipe"):
        import_partitions(str(tmp_path / "index"), [str(tmp_path)])


BOX = {"xmin": 0.0, "ymin": 0.0, "xmax": 9.0, "ymax": 1.0}
TAKEN: dict[str, dict[str, pa.Array | None]] = {
    "as written": {},
    "captions null": {"captions": pa.array([[None, "a"]] * ROWS)},
    "numbers for names": {"id": pa.array(range(ROWS)), "class": pa.array([3] * ROWS)},
    "a dictionary": {"id": pa.array(list("abcde")).dictionary_encode()},
    "metadata surrogate": {"metadata": first('{"meta": {"x": "\\ud800", "y": NaN}}')},
    "collection": {"geometry": first(collections(1)), "bbox": None},
    "outlines without bounds": {"bbox": None},
    "bounds that do not fit": {"bbox": pa.array([BOX] * ROWS)},
    "bounds without outlines": {"geometry": None},
    "bounds not finite": {"geometry": None, "bbox": pa.array([BOX | {"xmin": float("nan"), "xmax": np.inf}] * ROWS)},
    "nested columns": {
        "deep": pa.array([[[[[{"a": [1]}]]]]] * ROWS),
        "map": first([("a", 1)], pa.map_(pa.string(), pa.int32())),
    },
    "odd columns": {
        "a\"b'; drop": first("x"),
        "\x1b[2J": first(b"\xff"),
        "ID": pa.array(range(ROWS)),
        "no": pa.nulls(ROWS),
    },
    "many columns": {f"c{n}": pa.array([n] * ROWS) for n in range(600)},
}


@pytest.mark.parametrize("columns", TAKEN.values(), ids=TAKEN)
def test_what_can_be_meant_is_taken(columns: dict[str, pa.Array | None], tmp_path: Path) -> None:
    """The index is whole, its images can be read and found, and it goes out and in again."""
    index, parts = tmp_path / "index", tmp_path / "parts"
    write(tmp_path / "p.parquet", columns)
    assert import_partitions(str(index), [str(tmp_path / "p.parquet")]) == (ROWS, 0)
    assert verify_index(str(index)).problems == []
    tiles = opened(index)
    assert len(list(tiles)) == ROWS
    assert all(type(text) is str for image in tiles for text in image.captions)
    tiles.columns(tiles.schema.names)
    assert SearchFilter(since="2019")(tiles).all()
    assert export_index(str(index), str(parts)) == ROWS
    assert import_partitions(str(tmp_path / "again"), [str(parts)]) == (ROWS, 0)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({}, [0, 1, 2]),
        ({"bbox": None}, [0, 1, 2]),
        ({"bbox": pa.array([BOX] * ROWS)}, [0, 1, 2]),
        ({"geometry": None}, [0, 1, 2]),
        ({"geometry": None, "bbox": None}, []),
    ],
)
def test_places_are_found_by_outlines_or_bounds(
    columns: dict[str, pa.Array | None], expected: list[int], tmp_path: Path
) -> None:
    """Bounds that say something else than the outlines, or are not there, hide nothing."""
    write(tmp_path / "p.parquet", columns)
    import_partitions(str(tmp_path / "index"), [str(tmp_path / "p.parquet")])
    tiles = opened(tmp_path / "index")
    found = np.flatnonzero(SearchFilter(bbox=(-1, 0.2, 2.5, 0.8))(tiles))
    assert sorted(tiles[int(row)].image_id for row in found) == [f"i{n}" for n in expected]


def opened(index: Path) -> Tiles:
    tiles = Tiles()
    for segment in read_manifest(index).segments:
        checked, extent = checked_files(index, segment)[TILES], segment_extent(index, segment)
        tiles.append(index / segment.name, checked, segment.images, extent)
    return tiles
