"""Partitions: what is known of images comes back from GeoParquet, and GeoPandas and DuckDB read it as it is."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from msa_openclip.data.captioned import CaptionedImage
from msa_openclip.data.footprints import footprint
from msa_openclip.search import places
from msa_openclip.search.schema import (
    COLUMNS,
    Product,
    SchemaError,
    conform,
    instant,
    product_of,
    to_images,
    to_table,
    vectors,
    with_vectors,
    write_partition,
)
from msa_openclip.shards.records import Location

PRODUCT = Product(model="MSA-x=y.pt", fingerprint="ab" * 32, settings={"p": 1}, embed_dim=5, match_shape=(2, 3))


def square(west: float, south: float, side: float = 1.0) -> dict[str, object]:
    ring = [[west, south], [west + side, south], [west + side, south + side], [west, south + side], [west, south]]
    return {"type": "Polygon", "coordinates": [ring]}


def image(number: int, **metadata: object) -> CaptionedImage:
    location = Location("scenes/a.tif", window=(number, 2, 32, 33))
    return CaptionedImage(f"tile {number}", location, (f"a river {number}", "water"), "river", metadata, f"c{number}")


IMAGES = [
    image(0, geo={"footprint": square(12.5, 50), "crs": "EPSG:32633"}, meta={"cloud": 3, "date": "2020-06-30", "v": 1}),
    image(1, geo={"footprint": square(-70, -33.25)}, meta={"cloud": 4.5, "date": "2021", "v": "x", "sunny": True}),
    image(2, meta={"bands": [1, 2], "Cloud": 1, "class": "kept", "date": "yesterday"}, stac={"item": "s2"}),
    CaptionedImage("odd", Location("a.tar", 512, 700), (), None, {"geo": {}, "meta": None}),
    CaptionedImage("cell", Location("t.parquet", row=4, column="image"), ("",), "", {"geo": {"bounds": [1, 2, 3, 4]}}),
]


def test_images_come_back(tmp_path: Path) -> None:
    table = to_table(IMAGES)
    assert table["cloud"].to_pylist() == [3.0, 4.5, None, None, None]
    assert table["datetime"].to_pylist()[:3] == [
        datetime(2020, 6, 30, tzinfo=timezone.utc),
        datetime(2021, 1, 1, tzinfo=timezone.utc),
        None,
    ]
    assert "v" not in table.column_names  # numbers and texts
    write_partition(str(tmp_path / "p.parquet"), table, PRODUCT)
    back = to_images(pq.read_table(tmp_path / "p.parquet"))
    for mine in back:
        (original,) = (one for one in IMAGES if one.image_id == mine.image_id)
        assert mine == original
        assert mine.content == original.content
        expected = {name: value for name, value in original.metadata.items() if value}
        assert mine.metadata == expected


def test_vectors_come_back_and_rows_stay_together(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    features = generator.standard_normal((5, 5)).astype(np.float16)
    projected = generator.standard_normal((5, 2, 3)).astype(np.float16)
    write_partition(str(tmp_path / "p.parquet"), with_vectors(to_table(IMAGES), features, projected), PRODUCT)
    table = pq.read_table(tmp_path / "p.parquet")
    assert product_of(table.schema, "p") == PRODUCT
    found_features, found_projected = vectors(table, PRODUCT)
    order = [[one.image_id for one in IMAGES].index(name) for name in table["id"].to_pylist()]
    assert order[-3:] == [2, 3, 4]  # without a place, as they came
    np.testing.assert_array_equal(found_features, features[order])
    np.testing.assert_array_equal(found_projected, projected[order])


def test_geopandas_and_duckdb_read_it_as_it_is(tmp_path: Path) -> None:
    geopandas = pytest.importorskip("geopandas", reason="geopandas is not installed")
    duckdb = pytest.importorskip("duckdb", reason="duckdb (extra archive) is not installed")
    path = tmp_path / "p.parquet"
    features = np.eye(5, dtype=np.float16)
    write_partition(str(path), with_vectors(to_table(IMAGES), features, None), replace(PRODUCT, match_shape=None))
    frame = geopandas.read_parquet(path)
    assert frame.crs == "OGC:CRS84"
    assert sorted(map(tuple, frame.geometry.dropna().bounds.to_numpy())) == [
        (-70, -33.25, -69, -32.25),
        (12.5, 50, 13.5, 51),
    ]
    assert geopandas.read_parquet(path, bbox=(12, 49, 13, 52))["id"].tolist() == ["tile 0"]
    found = duckdb.sql(f"select id, \"global\"[1] from '{path}' where bbox.xmin < 0 and cloud > 4 and class = 'river'")
    assert found.fetchall() == [("tile 1", 0.0)]
    metadata = pq.read_schema(path).metadata
    assert metadata[b"emb:type"] == b"chip"
    assert json.loads(metadata[b"emb:dimensions"]) == 5
    assert json.loads(metadata[b"geo"])["columns"]["geometry"]["bbox"] == [-70, -33.25, 13.5, 51]


def test_a_partition_without_any_place_opens(tmp_path: Path) -> None:
    geopandas = pytest.importorskip("geopandas", reason="geopandas is not installed")
    write_partition(str(tmp_path / "p.parquet"), to_table(IMAGES[2:]), PRODUCT)
    assert geopandas.read_parquet(tmp_path / "p.parquet").geometry.isna().all()
    write_partition(str(tmp_path / "none.parquet"), to_table([]), PRODUCT)
    assert to_images(pq.read_table(tmp_path / "none.parquet")) == []


def test_what_no_outline_can_be_is_kept_as_metadata() -> None:
    for odd in (square(500, 0), {"type": "Polygon"}, {"type": "Polygon", "coordinates": []}, "here", {"type": "Hole"}):
        table = to_table([image(0, geo={"footprint": odd})])
        assert table["geometry"].null_count == 1
        assert to_images(table)[0].metadata == {"geo": {"footprint": odd}}


def test_bounds_in_a_crs_become_an_outline() -> None:
    pytest.importorskip("rasterio", reason="rasterio (extra geo) is not installed")
    geo = {"crs": "EPSG:32633", "bounds": [400000, 5800000, 401000, 5801000]}
    (box,) = to_table([image(0, geo=geo)])["bbox"].to_pylist()
    assert list(box.values()) == pytest.approx(footprint(geo["crs"], geo["bounds"])["bbox"], abs=1e-6)
    assert to_table([image(0, geo=geo | {"crs": "EPSG:0"})])["bbox"].null_count == 1


def test_a_tile_across_the_antimeridian_is_found_from_either_side() -> None:
    pytest.importorskip("rasterio", reason="rasterio (extra geo) is not installed")
    (row,) = to_table([image(0, geo={"crs": "EPSG:32660", "bounds": [780000, 0, 890000, 10000]})]).to_pylist()
    assert (row["bbox"]["xmin"], row["bbox"]["xmax"]) == (-180, 180)
    assert places.geometry_types([row["geometry"]]) == ["MultiPolygon"]


def test_the_curve_is_hilberts() -> None:
    """Every cell of a grid once, each beside the one before it."""
    x, y = (part.ravel() for part in np.meshgrid(np.arange(32), np.arange(32)))
    order = np.argsort(places._along_curve(x, y))
    assert sorted(places._along_curve(x, y)) == list(range(1024))
    steps = [abs(x[a] - x[b]) + abs(y[a] - y[b]) for a, b in itertools.pairwise(order)]
    assert set(steps) == {1}


def test_names_that_are_not_unicode_are_refused_by_name() -> None:
    with pytest.raises(SchemaError, match=r"'a\\udcff.png': not Unicode"):
        to_table([CaptionedImage("a", Location("a\udcff.png"), ())])
    assert to_table([image(0, meta={"note": "\udcff", "\udcfe": 1})])["metadata"][0].as_py()  # JSON escapes these


@pytest.mark.parametrize("text", ["", "x", "9", "20200630T", "2020-13"])
def test_what_is_no_date(text: str) -> None:
    assert instant(text) is None


def test_dates() -> None:
    assert instant("2020-06-30T12:00:00+02:00") == datetime(2020, 6, 30, 10, tzinfo=timezone.utc)
    assert instant("2020-06-30T12:00:00Z") == datetime(2020, 6, 30, 12, tzinfo=timezone.utc)
    assert instant("2020-06") == datetime(2020, 6, 1, tzinfo=timezone.utc)


def test_files_of_others_are_taken_or_named() -> None:
    """Large strings, 32-bit vectors and lists of any length are taken; what cannot be a partition is not."""
    table = pa.table(
        {
            "id": pa.array(["a", "b"], pa.large_string()),
            "source": ["a.tif", "b.tif"],
            "global": pa.array([[1.0] * 5] * 2, pa.list_(pa.float32())),
            "match": pa.array([[1.0] * 6] * 2, pa.list_(pa.float64())),
            "cloud": [1, 2],
        }
    )
    found = conform(table)
    assert found.schema.names == [*COLUMNS.names, "global", "match", "cloud"]
    assert vectors(found, PRODUCT)[1].shape == (2, 2, 3)
    assert to_images(found)[1] == CaptionedImage("b", Location("b.tif"), (), None)
    with pytest.raises(SchemaError, match="p: its metadata has no key `msa_openclip`"):
        product_of(table.schema, "p")
    known = {"msa_openclip": json.dumps(PRODUCT.__dict__)}
    with pytest.raises(SchemaError, match="p: no column `source`; it has id, global"):
        product_of(table.drop(["source"]).schema.with_metadata(known), "p")
    geometry = pa.field("geometry", pa.struct([("x", pa.float64())]))
    with pytest.raises(SchemaError, match="p: column `geometry` is struct<x: double>, expected binary"):
        product_of(table.schema.append(geometry).with_metadata(known), "p")
    for values, message in [
        ([[1.0] * 6, [1.0] * 4], r"column `match`: 10 numbers in 2 rows, expected 6 a row"),
        ([[1e9] * 6] * 2, "column `match`: numbers that float16 cannot hold"),
        ([None, [1.0] * 12], "column `match`: 12 numbers in 2 rows"),
        ([[1.0] * 5, [1.0] * 7], "column `match`: 12 numbers in 2 rows"),
    ]:
        odd = table.drop(["match"]).append_column("match", pa.array(values, pa.list_(pa.float32())))
        with pytest.raises(SchemaError, match=message):
            vectors(conform(odd), PRODUCT)
