"""What a search may find: places on Earth by box and polygon, dates, and DuckDB's expressions, locked to the index."""

from __future__ import annotations

import json
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers.index_files import append_part, tiles_of
from helpers.retrieval_data import square
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from msa_openclip.data.captioned import CaptionedImage
from msa_openclip.search import condition, places
from msa_openclip.search import tiles as tiles_module
from msa_openclip.search.filters import SearchError, SearchFilter
from msa_openclip.search.tiles import Tiles
from msa_openclip.shards.records import Location

SLANTED = {"type": "Polygon", "coordinates": [[[20, 0], [24, 4], [23, 5], [19, 1], [20, 0]]]}
ACROSS = {"type": "MultiPolygon", "coordinates": [square(179, 10)["coordinates"], square(-180, 10)["coordinates"]]}
OVER_POLE = {"type": "Polygon", "coordinates": [[[-180, 88], [180, 88], [180, 90], [-180, 90], [-180, 88]]]}
FOOTPRINTS = [square(12, 50), square(13, 50), SLANTED, ACROSS, OVER_POLE, None]


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Tiles:
    """Six images in two segments; the first lacks the column `cloud`, the second has `gsd` as text."""
    images = [
        CaptionedImage(
            f"i{number}",
            Location("a.tif" if number < 3 else "b.tif", window=(0, 0, 10 + number, 10)),
            (),
            label="x" if number % 2 else None,
            metadata={
                **({"geo": {"footprint": outline}} if outline else {}),
                "meta": {
                    **({"cloud": 10 * number} if number >= 3 else {}),
                    "gsd": 0.5 if number < 3 else "10 m",
                    "date": ("2019-12-31", "2020-01-01", "2020-02-29", "2020-03", "2021", "soon")[number],
                },
                "stac": {"item": f"s{number}"},
            },
        )
        for number, outline in enumerate(FOOTPRINTS)
    ]
    return tiles_of(tmp_path_factory.mktemp("tiles"), [images[:3], images[3:]])


def found(tiles: Tiles, **where: object) -> list[int]:
    return np.flatnonzero(SearchFilter(**where)(tiles)).tolist()


@pytest.mark.parametrize(
    ("bbox", "expected"),
    [
        ((12.5, 50.5, 12.6, 50.6), [0]),
        ((12.5, 50.5, 13, 51), [0, 1]),  # touching counts
        ((-180, -90, 180, 90), [0, 1, 2, 3, 4]),
        ((19, 4, 20, 5), []),  # within the bounds of the slanted one, outside of its outline
        ((21, 1, 22, 2), [2]),
        ((179.5, 10, -179.5, 11), [3]),  # across the antimeridian
        ((179.5, 10, 180, 11), [3]),
        ((-180, 10, -179.5, 11), [3]),
        ((0, 10, 1, 11), []),  # its bounds span all longitudes, its outline does not
        ((-40, 89, -39, 90), [4]),
        ((170, 80, -170, 90), [4]),
    ],
)
def test_boxes(tiles: Tiles, bbox: tuple[float, ...], expected: list[int]) -> None:
    assert found(tiles, bbox=bbox) == expected


@pytest.mark.parametrize(
    ("polygon", "expected"),
    [
        ("POLYGON((11 49, 12.5 49, 12.5 52, 11 52, 11 49))", [0]),
        ("POINT(12.5 50.5)", [0]),
        ("POLYGON((178 9, 182 9, 182 12, 178 12, 178 9))", [3]),  # beyond 180
        ("POLYGON((-182 9, -178 9, -178 12, -182 12, -182 9))", [3]),
        (json.dumps(square(12.25, 50.25, 0.5)), [0]),
        (json.dumps({"type": "Feature", "properties": {}, "geometry": square(12.25, 50.25, 0.5)}), [0]),
        (
            json.dumps(
                {
                    "type": "FeatureCollection",
                    "features": [{"type": "Feature", "geometry": square(x, 50.25, 0.1)} for x in (12.2, 13.2)],
                }
            ),
            [0, 1],
        ),
    ],
)
def test_polygons(tiles: Tiles, polygon: str, expected: list[int]) -> None:
    assert found(tiles, polygon=polygon) == expected


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"bbox": (0, 0, 200, 1)}, "bbox 0,0,200,1: expected WEST,SOUTH,EAST,NORTH"),
        ({"bbox": (0, 0, float("nan"), 1)}, "bbox 0,0,nan,1: expected"),
        ({"polygon": "POLYGON((0 0, 1 1, 1 0, 0 1, 0 0))"}, r"polygon: Self-intersection.*; a polygon must not cross"),
        ({"polygon": "POLYGON EMPTY"}, "polygon: it spans nan"),
        ({"polygon": "POLYGON((4e5 5e6, 4e5 6e6, 5e5 6e6, 4e5 5e6))"}, "polygon: it spans .*expected degrees of WGS84"),
        ({"polygon": "nowhere.json"}, "polygon: neither WKT nor GeoJSON"),
        ({"polygon": "{}"}, "polygon: neither WKT nor GeoJSON"),
        ({"polygon": '{"type": "Feature", "geometry": null}'}, "polygon: neither WKT nor GeoJSON"),
        ({"since": "yesterday"}, "since 'yesterday': expected an ISO date"),
    ],
)
def test_places_and_dates_that_are_none_are_named(where: dict[str, object], message: str) -> None:
    with pytest.raises(SearchError, match=message):
        SearchFilter(**where)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"since": "2020"}, [1, 2, 3, 4]),
        ({"until": "2020"}, [0, 1, 2, 3]),
        ({"until": "2020-02"}, [0, 1, 2]),
        ({"until": "2020-02-28"}, [0, 1]),
        ({"until": "2020-01-01T00:00:00Z"}, [0, 1]),
        ({"since": "2020-01-01T01:00:00+01:00", "until": "2020-01"}, [1]),
        ({"until": "9999"}, [0, 1, 2, 3, 4]),
    ],
)
def test_dates(tiles: Tiles, where: dict[str, str], expected: list[int]) -> None:
    assert found(tiles, **where) == expected


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("cloud < 45", [3, 4]),
        ("cloud is null", [0, 1, 2]),
        ("CLOUD >= 40 and class is null", [4]),
        ("source = 'a.tif' or cloud = 50", [0, 1, 2, 5]),
        ("gsd = '10 m'", [3, 4, 5]),
        ('"window".width = 11', [1]),
        ("bbox.xmin < 0", [3, 4]),
        ("datetime >= '2020-02-01' and datetime < '2021-01-01'", [2, 3]),
        ("metadata->>'$.stac.item' = 's2'", [2]),
        ("true", [0, 1, 2, 3, 4, 5]),
        ("null", []),
    ],
)
def test_expressions(tiles: Tiles, where: str, expected: list[int]) -> None:
    pytest.importorskip("duckdb", reason="duckdb (extra archive) is not installed")
    assert found(tiles, where=where) == expected


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("clouds < 3", r"clouds.*not found.*The columns are id, source, .*, metadata, gsd, date, cloud\."),
        ("cloud <", "syntax error"),
        ("", None),
        ("1 = 1; drop table x", "Parser Error"),
        ("true) union select (1", "Parser Error"),
        ("count(*) > 1", "aggregates"),
    ],
)
def test_expressions_that_are_none_are_named(tiles: Tiles, where: str, message: str | None) -> None:
    pytest.importorskip("duckdb", reason="duckdb (extra archive) is not installed")
    if message is None:
        assert len(found(tiles, where=where)) == 6
        return
    with pytest.raises(SearchError, match=message) as caught:
        found(tiles, where=where)
    assert "\n" not in str(caught.value)


def test_expressions_reach_nothing_but_the_index(tiles: Tiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No files, no network, no extensions, no variables of this process, and no way to allow them again."""
    pytest.importorskip("duckdb", reason="duckdb (extra archive) is not installed")
    secret = tmp_path / "secret.csv"
    secret.write_text("a\n1\n")
    mine = pa.table({"a": [1]})
    monkeypatch.setenv("SECRET", "x")
    for expression in (
        f"exists(select * from read_csv('{secret}'))",
        f"exists(select * from '{secret}')",
        f"exists(select * from read_text('{secret}'))",
        f"exists(select * from glob('{tmp_path}/*'))",
        "exists(select * from read_csv('http://127.0.0.1:1/x.csv'))",
        f"true); copy (select 1) to '{tmp_path}/out.csv'; select (true",
        f"true; attach '{tmp_path}/x.db'",
        "true; set enable_external_access = true",
        "(set lock_configuration = false)",
        "exists(select * from mine)",
        "getenv('SECRET') = 'x'",
    ):
        with pytest.raises(SearchError, match=r"Permission|Catalog|Parser|Invalid"):
            found(tiles, where=expression)
    assert len(mine) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["secret.csv"]
    assert found(tiles, where="current_setting('enable_external_access')") == []
    assert len(found(tiles, where="current_setting('lock_configuration')")) == 6


@pytest.mark.parametrize(
    "where",
    [
        "(select count(*) from range(10000000000) where range % 7 = 3) > 0",
        "(select max(a.range) from range(100000000) a, range(1000000000) b) > cloud",
        "length(repeat('xx', 2000000000)) > 0",
        "list_sum(range(1000000000)) > 0",
        "(" * 30_000,
    ],
)
def test_expressions_without_end_are_ended(tiles: Tiles, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Also inside one function, and while it is parsed, where DuckDB can neither be interrupted nor bounded."""
    pytest.importorskip("duckdb", reason="duckdb (extra archive) is not installed")
    monkeypatch.setattr(condition, "LONGEST_S", 1)
    monkeypatch.setattr(condition, "MEMORY_BYTES", 1 << 30)
    with pytest.raises(SearchError, match="it takes too much time or memory; ask for less") as caught:
        found(tiles, where=where)
    assert len(str(caught.value)) < 600


def test_a_column_with_the_name_of_the_rows_changes_nothing() -> None:
    pytest.importorskip("duckdb", reason="duckdb (extra archive) is not installed")
    table = pa.table({"Row number in the index": [5, 6, 7], "row number in the index_": [1, 1, 1]})
    where = '"Row number in the index" > 5 and "row number in the index_" = 1'
    assert condition.matching(where, table).tolist() == [False, True, True]


def test_what_is_not_unicode_is_no_expression(tiles: Tiles) -> None:
    with pytest.raises(SearchError, match=r"Unicode|DuckDB is missing"):
        found(tiles, where="class = '\udc80'")


def test_an_index_without_images(tmp_path: Path) -> None:
    assert found(Tiles(), bbox=(0, 0, 1, 1), where="x") == []


def test_images_and_columns_of_all_segments(tiles: Tiles) -> None:
    assert [image.image_id for image in tiles] == [f"i{number}" for number in range(6)]
    assert tiles[3].metadata["meta"] == {"cloud": 30, "gsd": "10 m", "date": "2020-03"}
    assert tiles[4:6] == [tiles[4], tiles[5]]
    assert tiles.columns(["gsd"])["gsd"].to_pylist() == ["0.5", "0.5", "0.5", "10 m", "10 m", "10 m"]
    assert tiles.columns(["datetime"])["datetime"][2].as_py() == datetime(2020, 2, 29, tzinfo=timezone.utc)


def known(number: int, **meta: object) -> CaptionedImage:
    return CaptionedImage(f"i{number}", Location("a.tif"), (), metadata={"meta": meta})


def test_names_that_differ_in_case_alone_are_one_column(tmp_path: Path) -> None:
    pytest.importorskip("duckdb", reason="duckdb (extra archive) is not installed")
    tiles = tiles_of(tmp_path, [[known(0, Cloud=5)], [known(1, cloud=6.5)], [known(2, CLOUD=20)]])
    assert found(tiles, where="cloud < 10") == found(tiles, where="Cloud < 10") == [0, 1]
    assert [image.metadata["meta"] for image in tiles] == [{"Cloud": 5}, {"cloud": 6.5}, {"CLOUD": 20}]


def test_a_column_of_lists_here_and_texts_there_is_text(tmp_path: Path) -> None:
    pytest.importorskip("duckdb", reason="duckdb (extra archive) is not installed")
    tiles = tiles_of(tmp_path, [[known(0, bands="rgb")], [known(1, bands="nir")]])
    part = tiles._parts[1]
    part._columns["bands"] = pa.chunked_array([pa.array([["r", "nir"]])])
    part.__dict__["schema"] = part.schema.set(
        part.schema.get_field_index("bands"), pa.field("bands", pa.list_(pa.string()))
    )
    assert found(tiles, where="bands like '%nir%'") == [1]
    assert tiles.columns(["bands"])["bands"].to_pylist() == ["rgb", '["r", "nir"]']


def test_each_part_of_a_region_keeps_its_dimension() -> None:
    far = {"type": "Feature", "properties": {}, "geometry": square(100, 10)}
    point = {"type": "Feature", "properties": {}, "geometry": {"type": "Point", "coordinates": [12.5, 50.5]}}
    drawn = places.polygon("\ufeff" + json.dumps({"type": "FeatureCollection", "features": [far, point]}))
    assert drawn.covers(places.polygon("POINT(12.5 50.5)"))
    assert drawn.area == 1


def test_bounds_and_values_of_some_rows(tmp_path: Path) -> None:
    images = [
        CaptionedImage(f"i{number}", Location("a.tif"), (), metadata={"geo": {"footprint": square(number, 50)}})
        for number in range(5)
    ]
    tiles, everywhere = tiles_of(tmp_path, [images[:2], images[2:3]]), np.array([places.EARTH])
    (run,) = tiles.reaching(everywhere)
    assert (run[0], run[1][:, 0].tolist()) == (0, [0, 1, 2])
    append_part(tiles, tmp_path / "late.parquet", images[3:])
    (run,) = tiles.reaching(everywhere)
    assert (run[0], run[1][:, 0].tolist()) == (0, [0, 1, 2, 3, 4])
    assert tiles.values("id", np.array([1, 2, 4])) == ["i1", "i2", "i4"]
    assert tiles.values("id", np.array([], dtype=np.int64)) == []


sides = st.integers(-175, 174).flatmap(lambda west: st.tuples(st.just(west), st.integers(-85, 84)))
outlines = st.none() | sides.map(lambda at: square(*at)) | st.sampled_from([SLANTED, ACROSS, OVER_POLE])


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(footprints=st.lists(outlines, min_size=1, max_size=6), asked=st.lists(st.tuples(sides, sides), max_size=3))
def test_segments_that_lie_elsewhere_are_passed_over(
    footprints: list[dict[str, Any] | None], asked: list[tuple[tuple[int, int], tuple[int, int]]], tmp_path: Path
) -> None:
    """With a segment for each image, and all in one, which no box passes over, the answers are equal."""
    images = [
        CaptionedImage(f"i{number}", Location("a.tif"), (), metadata={"geo": {"footprint": one}} if one else {})
        for number, one in enumerate(footprints)
    ]
    folders = [Path(tempfile.mkdtemp(dir=tmp_path)) for _ in range(2)]
    apart, together = tiles_of(folders[0], [[image] for image in images]), tiles_of(folders[1], [images])
    for (west, one), (east, other) in asked:
        bbox = (west, min(one, other), east, max(one, other))
        assert found(apart, bbox=bbox) == found(together, bbox=bbox)


def test_a_segment_that_lies_elsewhere_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [
        CaptionedImage(f"i{number}", Location("a.tif"), (), metadata={"geo": {"footprint": square(west, 50)}})
        for number, west in enumerate((10, 11, 40, 41))
    ]
    tiles, read, asked = tiles_of(tmp_path, [images[:2], images[2:]]), tiles_module.read_columns, []
    monkeypatch.setattr(tiles_module, "read_columns", lambda *given: asked.append(given[2]) or read(*given))
    assert found(tiles, bbox=(40.2, 50.2, 40.4, 50.4)) == [2]
    assert asked.count(["bbox"]) == 1
    assert found(tiles, bbox=(10.2, 50.2, 41.4, 50.4)) == [0, 1, 2, 3]
    assert asked.count(["bbox"]) == 2
    assert found(tiles, bbox=(10.2, 50.2, 41.4, 50.4)) == [0, 1, 2, 3]
    assert asked.count(["bbox"]) == 2, (
        "decoded once: a query over a million takes milliseconds, not a tenth of a second"
    )
