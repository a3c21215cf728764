"""Lists of windows: pixels or places, from GeoParquet and CSV."""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.stream_data import FlakyFileSystem, flaky_store

from msa_openclip.data import streams
from msa_openclip.data.captioned import EvalDataError
from msa_openclip.data.pixels import load_image
from msa_openclip.data.scenes import Tiling, read_scenes
from msa_openclip.data.windows import read_windows

rasterio = pytest.importorskip("rasterio", reason="rasterio (extra geo) is not installed")
pa = pytest.importorskip("pyarrow", reason="pyarrow (extra archive) is not installed")
shapely = pytest.importorskip("shapely", reason="shapely (extra archive) is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

VALUES = np.random.default_rng(0).integers(1, 255, (3, 70, 100), dtype=np.uint8)


def write_scene(path: Path, crs: str | None = "EPSG:32633", pixel_m: float = 2) -> Path:
    """70 x 100 pixels of 2 m."""
    path.parent.mkdir(exist_ok=True)
    where = {"crs": crs, "transform": rasterio.Affine(pixel_m, 0, 400000, 0, -pixel_m, 5800000)}
    with rasterio.open(path, "w", driver="GTiff", width=100, height=70, count=3, dtype="uint8", **where) as out:
        out.write(VALUES)
    return path


def write_list(path: Path, columns: dict[str, Any], geo: dict[str, Any] | None = None) -> str:
    import pyarrow.csv
    import pyarrow.parquet

    table = pa.table(columns)
    if path.suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    else:
        pyarrow.parquet.write_table(table.replace_schema_metadata({"geo": json.dumps(geo)} if geo else None), path)
    return str(path)


@pytest.mark.parametrize("name", ["list.parquet", "list.csv"])
def test_windows_in_pixels_with_what_the_list_says(tmp_path: Path, name: str) -> None:
    write_scene(tmp_path / "in/a.tif")
    write_scene(tmp_path / "in/b.tif")
    columns = {
        "href": ["in/b.tif", "in/a.tif", str(tmp_path / "in/b.tif")],
        "col_off": [3, 0, 60],
        "row_off": [5, 0, 30],
        "width": [20, 100, 40],
        "height": [11, 70, 40],
        "id": ["one", "two", None],
        "class": ["harbor", None, None],
        "caption": ["two ships", None, None],
        "datetime": ["2021-05-04T10:00:00Z", None, None],
        "cloud": [0.25, None, 7.0],
    }
    tiles, skipped = read_windows(write_list(tmp_path / name, columns))
    assert skipped == []
    one, last, two = tiles  # scene by scene
    assert (one.image_id, one.label, one.captions) == ("one", "harbor", ("two ships",))
    assert one.metadata["meta"]["cloud"] == 0.25
    assert str(one.metadata["meta"]["date"]).startswith("2021-05-04")
    assert one.location.window == (3, 5, 20, 11)
    assert np.array_equal(np.asarray(load_image(one)), np.moveaxis(VALUES[:, 5:16, 3:23], 0, -1))
    assert last.image_id == f"{tmp_path}/in/b.tif#60,30,40,40"
    assert last.metadata["meta"] == {"cloud": 7.0}
    assert (two.image_id, two.label, two.captions) == ("two", None, ())
    ((same,), _) = read_scenes([str(tmp_path / "in/a.tif")], Tiling(tile_px=100))
    assert two.content == same.content
    assert two.metadata["geo"]["bbox"] == same.metadata["geo"]["bbox"]


@pytest.mark.parametrize("name", ["list.parquet", "list.csv"])
def test_places_find_their_windows(tmp_path: Path, name: str) -> None:
    """The outline of a tile gives at least that tile, and at most a few pixels more: the grid is turned in degrees."""
    scene = write_scene(tmp_path / "a.tif")
    tiles, _ = read_scenes([str(scene)], Tiling(tile_px=30))
    shapes = [shapely.geometry.shape(tile.metadata["geo"]["footprint"]) for tile in tiles]
    geometry = [shapely.to_wkb(shape) if name.endswith("parquet") else shapely.to_wkt(shape, 12) for shape in shapes]
    found, skipped = read_windows(write_list(tmp_path / name, {"scene": ["a.tif"] * len(tiles), "geometry": geometry}))
    assert skipped == []
    for tile, other in zip(tiles, found, strict=True):
        left, top, width, height = tile.location.window or ()
        at = other.location.window or ()
        assert left - 2 <= at[0] <= left
        assert top - 2 <= at[1] <= top
        assert left + width <= at[0] + at[2] <= left + width + 2
        assert top + height <= at[1] + at[3] <= top + height + 2


def test_texts_of_csv_stay_what_they_are(tmp_path: Path) -> None:
    write_scene(tmp_path / "a.tif")
    (tmp_path / "list.csv").write_text(
        "id,class,href,col_off,row_off,width,height,cloud\n001,01,a.tif,0,0,9,9,5\n1e5,NA,a.tif,10.0,0,9,9,NA\nNA,,a.tif,20,0,9,9,7\n"
    )
    tiles, skipped = read_windows(str(tmp_path / "list.csv"))
    assert skipped == []
    assert [(tile.image_id, tile.label) for tile in tiles] == [("001", "01"), ("1e5", "NA"), ("NA", None)]
    assert [tile.metadata.get("meta") for tile in tiles] == [{"cloud": 5}, None, {"cloud": 7}]


def test_metadata_is_plain_however_nested(tmp_path: Path) -> None:
    write_scene(tmp_path / "a.tif")
    when = datetime.datetime(2021, 5, 4)
    columns = {"href": ["a.tif"], "col_off": [0], "row_off": [0], "width": [9], "height": [9]}
    nested = {"about": [{"when": when, "bands": [b"\0\xff", None]}]}
    ((tile,), _) = read_windows(write_list(tmp_path / "list.parquet", columns | nested))
    assert tile.metadata["meta"] == {"about": {"when": "2021-05-04T00:00:00", "bands": ["00ff", None]}}
    json.dumps(tile.metadata)


def test_a_place_across_the_antimeridian_is_narrow(tmp_path: Path) -> None:
    """However it is written: cut in two as RFC 7946 has it, or on beyond 180."""
    where = {"crs": "EPSG:32601", "transform": rasterio.Affine(100, 0, 200000, 0, -100, 7300000)}
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", width=2500, height=100, count=1, dtype="uint8", **where
    ) as out:
        out.write(np.ones((1, 100, 2500), dtype=np.uint8))
    cut = [shapely.box(179.9, 65.72, 180, 65.74), shapely.box(-180, 65.72, -179.9, 65.74)]
    shapes = [shapely.MultiPolygon(cut), shapely.box(179.9, 65.72, 180.1, 65.74)]
    columns = {"href": ["a.tif"] * 2, "id": ["cut", "on"], "geometry": [shapely.to_wkb(shape) for shape in shapes]}
    (one, two), _ = read_windows(write_list(tmp_path / "list.parquet", columns))
    assert one.location.window == two.location.window
    x, y = rasterio.warp.transform("EPSG:4326", "EPSG:32601", [179.9, 179.9, -179.9, -179.9], [65.72, 65.74] * 2)
    left, top, width, height = one.location.window or ()
    assert left == math.floor((min(x) - 200000) / 100)
    assert left + width == math.ceil((max(x) - 200000) / 100)
    assert 0 <= top <= math.floor((7300000 - max(y)) / 100)
    assert height < 100


def test_a_store_that_fails_ends_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_scene(tmp_path / "a.tif")
    columns = {"col_off": [0] * 2, "row_off": [0] * 2, "width": [9] * 2, "height": [9] * 2}
    monkeypatch.setenv(streams.RETRIES_VARIABLE, "0")
    with flaky_store(monkeypatch) as store:
        FlakyFileSystem.failures = [True]
        path = write_list(tmp_path / "list.parquet", columns | {"href": ["a.tif", f"{store}/b.tif"]})
        with pytest.raises(streams.StreamError, match=r"b\.tif: failed 1 times"):
            read_windows(path)


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    write_scene(tmp_path / "a.tif")
    write_scene(tmp_path / "nowhere.tif", crs=None)
    write_scene(tmp_path / "mars.tif", crs="IAU_2015:49900")
    write_scene(tmp_path / "flat.tif", pixel_m=0)
    (tmp_path / "broken.tif").write_bytes(b"II*\0")
    far = shapely.to_wkb(shapely.box(0, 0, 1, 1))
    rows = [
        ("a.tif", "good", (0, 0, 5, 5), None),
        ("a.tif", "outside", (90, 0, 11, 5), None),
        ("a.tif", "half", (90, None, 11, 5), None),
        ("a.tif", "fraction", (10.9, 0, 5, 5), None),
        ("a.tif", "endless", (math.inf, 0, 5, 5), None),
        ("mars.tif", "mars", (None,) * 4, far),
        ("flat.tif", "flat", (None,) * 4, far),
        ("a.tif", "far", (None,) * 4, far),
        ("a.tif", "no place", (None,) * 4, None),
        ("a.tif", "no WKB", (None,) * 4, b"x"),
        ("nowhere.tif", "no crs", (None,) * 4, far),
        ("broken.tif", "x", (0, 0, 1, 1), None),
        ("absent.tif", "y", (0, 0, 1, 1), None),
        (None, "z", (0, 0, 1, 1), None),
    ]
    columns: dict[str, Any] = {"href": [row[0] for row in rows], "id": [row[1] for row in rows]}
    for place, name in enumerate(("col_off", "row_off", "width", "height")):
        columns[name] = pa.array([row[2][place] for row in rows], pa.float64())
    columns["geometry"] = [row[3] for row in rows]
    tiles, skipped = read_windows(write_list(tmp_path / "list.parquet", columns))
    assert [tile.image_id for tile in tiles] == ["good"]
    reasons = {row.file.rpartition("/")[2]: row.reason for row in skipped}
    assert len(reasons) == len(skipped) == 13
    assert reasons["a.tif outside"] == "not within the 100 x 70 pixels of the scene"
    for name in ("half", "fraction", "endless"):
        assert "must be whole numbers" in reasons[f"a.tif {name}"]
    assert "its place cannot be found in" in reasons["mars.tif mars"]
    assert "its place cannot be found in" in reasons["flat.tif flat"]
    assert reasons["a.tif far"] == "lies outside the scene"
    assert reasons["a.tif no place"] == reasons["a.tif no WKB"] == "neither a window nor a geometry that can be read"
    assert "no CRS" in reasons["nowhere.tif no crs"]
    assert "rasterio cannot open it" in reasons["broken.tif"]
    assert "FileNotFoundError" in reasons["absent.tif"]
    assert reasons["list.parquet: row 13"] == "no scene"


def test_lists_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    def refused(match: str, columns: dict[str, Any], geo: dict[str, Any] | None = None) -> None:
        with pytest.raises(EvalDataError, match=match):
            read_windows(write_list(tmp_path / "list.parquet", columns, geo))

    refused("no column of scenes, href, source, scene, url; it has x", {"x": [1]})
    refused("neither col_off, row_off, width, height nor geometry; it has href", {"href": ["a.tif"]})
    projected = {
        "primary_column": "geometry",
        "columns": {"geometry": {"crs": {"id": {"authority": "EPSG", "code": 32633}}}},
    }
    refused("geometries in EPSG:32633; expected WGS84", {"href": ["a.tif"], "geometry": [b""]}, projected)
    refused(
        "no tile can be used; it has no rows",
        {"href": pa.array([], pa.string()), "geometry": pa.array([], pa.binary())},
    )
    (tmp_path / "x.parquet").write_bytes(b"no")
    with pytest.raises(EvalDataError, match=r"x\.parquet: not a list that can be read"):
        read_windows(str(tmp_path / "x.parquet"))
    with pytest.raises(EvalDataError, match=r"absent\.csv: not found"):
        read_windows(str(tmp_path / "absent.csv"))
