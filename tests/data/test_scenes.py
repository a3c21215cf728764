"""Scenes cut into tiles on the fly, and STAC catalogues of them."""

from __future__ import annotations

import datetime
import http.server
import itertools
import json
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from helpers.stream_data import FlakyFileSystem, flaky_store
from hypothesis import given, settings
from hypothesis import strategies as st

from msa_openclip.data import stac, streams
from msa_openclip.data.captioned import EvalDataError
from msa_openclip.data.footprints import footprint
from msa_openclip.data.pixels import load_image
from msa_openclip.data.scenes import Tiling, read_scenes
from msa_openclip.data.stac import read_stac
from msa_openclip.search.places import outlines
from msa_openclip.shards.imagery.geotiff import MOST_TILES
from msa_openclip.shards.records import ImageProblem

rasterio = pytest.importorskip("rasterio", reason="rasterio (extra geo) is not installed")
shapely = pytest.importorskip("shapely", reason="shapely (extra geo) is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def write_scene(path: Path, values: np.ndarray, **profile: Any) -> Path:
    """A raster (bands, rows, columns) in UTM zone 33 with pixels of 2 m, unless asked otherwise."""
    profile = {"crs": "EPSG:32633", "transform": rasterio.Affine(2, 0, 400000, 0, -2, 5800000)} | profile
    tags = profile.pop("tags", {})
    bands, height, width = values.shape
    path.parent.mkdir(parents=True, exist_ok=True)
    size = {"width": width, "height": height, "count": bands, "dtype": values.dtype}
    with rasterio.open(path, "w", driver="GTiff", **size, **profile) as out:
        out.write(values)
        out.update_tags(**tags)
    return path


def noise(height: int = 70, width: int = 100) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 255, (3, height, width), dtype=np.uint8)


CENTRES = {
    "EPSG:3413": ((0, 0), (-700_000, 700_000)),
    "EPSG:3031": ((0, 0), (0, -700_000)),
    "EPSG:3995": ((0, 0), (0, 700_000)),
    "EPSG:32601": ((500_000, 9_997_965), (225_000, 7_200_000)),
    "EPSG:3857": ((0, 8_000_000), (20_037_508, 100_000)),
    "EPSG:6933": ((1_000_000, 5_000_000), (17_367_530, 100_000)),
}
"""By CRS: a pole, or a point at high latitude where it has none; a point on the antimeridian."""


def outline_of(geo: dict[str, Any]) -> Any:
    return shapely.geometry.shape(geo["footprint"])


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(0, 49), st.integers(1, 200), st.integers(1, 200))
def test_windows_cover_the_scene_and_overlap_as_asked(tile: int, overlap: int, width: int, height: int) -> None:
    overlap = min(overlap, tile - 1)
    windows = Tiling(tile_px=tile, overlap_px=overlap).windows(width, height)
    covered = np.zeros((height, width), dtype=bool)
    for left, top, w, h in windows:
        assert (w, h) == (min(tile, width), min(tile, height))
        assert 0 <= left <= width - w
        assert 0 <= top <= height - h
        covered[top : top + h, left : left + w] = True
    assert covered.all()
    for lefts in (sorted({window[0] for window in windows}), sorted({window[1] for window in windows})):
        assert all(after - before <= tile - overlap for before, after in itertools.pairwise(lefts))


def test_tiles_are_the_scenes_own_pixels_and_know_where_they_are(tmp_path: Path) -> None:
    values = noise()
    scene = write_scene(tmp_path / "scene.tif", values, tags={"TIFFTAG_DATETIME": "2020:06:30 10:00:00"})
    tiles, skipped = read_scenes([str(scene)], Tiling(tile_px=40, overlap_px=10))
    assert skipped == []
    assert len(tiles) == 2 * 3
    assert len({tile.image_id for tile in tiles}) == len(tiles)
    for tile in tiles:
        left, top, width, height = tile.location.window or ()
        expected = np.moveaxis(values[:, top : top + height, left : left + width], 0, -1)
        assert np.array_equal(np.asarray(load_image(tile)), expected)
        geo = tile.metadata["geo"]
        assert geo["bounds"] == [
            400000 + 2 * left,
            5800000 - 2 * (top + 40),
            400000 + 2 * (left + 40),
            5800000 - 2 * top,
        ]
        west, south, east, north = geo["bbox"]
        assert 13 < west < east < 14
        assert 52 < south < north < 53
        assert tile.metadata["meta"] == {"date": "2020-06-30"}


def test_a_small_scene_is_one_tile_by_its_own_name(tmp_path: Path) -> None:
    scene = write_scene(tmp_path / "scene.tif", noise(20, 30))
    ((tile,), _) = read_scenes([str(scene)])
    assert tile.image_id == str(scene)
    assert load_image(tile).size == (30, 20)


def test_tiles_without_data_are_counted_and_named(tmp_path: Path) -> None:
    values = noise(64, 128)
    values[:, :, :80] = 0
    scene = write_scene(tmp_path / "scene.tif", values, nodata=0)
    tiles, skipped = read_scenes([str(scene)], Tiling(tile_px=32, max_nodata=0.4))
    assert {tile.location.window[0] for tile in tiles if tile.location.window} == {96}
    assert len(skipped) == 2 * 3
    assert skipped[0].file == f"{scene} (0, 0, 32, 32)"
    assert skipped[0].reason == "about 100% of its pixels have no data"
    half, _ = read_scenes([str(scene)], Tiling(tile_px=32, max_nodata=0.6))
    assert {tile.location.window[0] for tile in half if tile.location.window} == {64, 96}


def test_tiles_with_any_data_are_kept_where_all_of_them_are_asked_for(tmp_path: Path) -> None:
    values = np.zeros((3, 256, 512), dtype=np.uint8)
    values[:, 1:3, 1:3] = 9  # smaller than a pixel of the mask from which shares are told
    scene = write_scene(tmp_path / "scene.tif", values, nodata=0)
    ((tile,), (skipped,)) = read_scenes([str(scene)], Tiling(max_nodata=1))
    assert tile.location.window == (0, 0, 256, 256)
    assert skipped == (f"{scene} (256, 0, 256, 256)", "none of its pixels has data")


def test_folders_patterns_and_broken_scenes(tmp_path: Path) -> None:
    write_scene(tmp_path / "in/a.tif", noise(20, 20))
    whole = write_scene(tmp_path / "in/sub/b.tif", noise(20, 20)).read_bytes()
    (tmp_path / "in/c.tif").write_bytes(whole[: len(whole) // 8])
    (tmp_path / "in/d.tif").write_bytes(b"")
    tiles, skipped = read_scenes([str(tmp_path / "in")])
    assert [Path(tile.location.url).name for tile in tiles] == ["a.tif", "b.tif"]
    assert [Path(row.file).name for row in skipped] == ["c.tif", "d.tif"]
    tiles, _ = read_scenes([str(tmp_path / "in/a*.tif")])
    assert len(tiles) == 1
    with pytest.raises(EvalDataError, match=r"x\*\.tif: no scene; expected files that end in \.tif or \.tiff"):
        read_scenes([str(tmp_path / "in/x*.tif")])
    with pytest.raises(EvalDataError, match=r"d\.tif: no tile can be used; first .*d\.tif: rasterio cannot open it"):
        read_scenes([str(tmp_path / "in/d.tif")])


def test_patterns_are_of_whole_paths(tmp_path: Path) -> None:
    for name in ("2020/x.tif", "2021/x.tif", "top.tif", "s[1].tif", "s1.tif", "[2]/y.tif"):
        write_scene(tmp_path / name, noise(20, 20))

    def found(pattern: str) -> list[str]:
        tiles, _ = read_scenes([f"{tmp_path}/{pattern}"])
        return [tile.image_id.removeprefix(f"{tmp_path}/") for tile in tiles]

    assert found("202?/*.tif") == found("*/x.tif") == ["2020/x.tif", "2021/x.tif"]
    assert found("t*.tif") == ["top.tif"]
    assert found("*.tif") == ["s1.tif", "s[1].tif", "top.tif"]
    assert found("**/x.tif") == ["2020/x.tif", "2021/x.tif"]
    assert found("s[1].tif") == ["s[1].tif"]  # what has the name goes before what matches it
    assert found("[2]") == ["[2]/y.tif"]


def test_patterns_in_a_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = write_scene(tmp_path / "x.tif", noise(20, 20)).read_bytes()
    with flaky_store(monkeypatch) as store:
        for name in ("2020/x.tif", "2021/x.tif", "top.tif"):
            fsspec.filesystem("memory").pipe_file(f"/flaky/{name}", content)
        tiles, _ = read_scenes([f"{store}/202?/*.tif"])
    assert [tile.image_id for tile in tiles] == [f"{store}/2020/x.tif", f"{store}/2021/x.tif"]


def test_a_store_that_fails_ends_the_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else ranks would have different lists.  What is absent is left out: that does not pass."""
    scene = write_scene(tmp_path / "a.tif", noise(20, 20))
    monkeypatch.setenv(streams.RETRIES_VARIABLE, "0")
    with flaky_store(monkeypatch) as store:
        _, (gone,) = read_scenes([str(scene), f"{store}/b.tif"])
        assert gone.file == f"{store}/b.tif"
        FlakyFileSystem.failures = [True]
        with pytest.raises(streams.StreamError, match=rf"{store}/b\.tif: failed 1 times"):
            read_scenes([str(scene), f"{store}/b.tif"])


def test_a_scene_without_crs_has_no_place(tmp_path: Path) -> None:
    scene = write_scene(tmp_path / "scene.tif", noise(20, 20), crs=None)
    ((tile,), _) = read_scenes([str(scene)])
    assert "bbox" not in tile.metadata["geo"]


def test_a_vrt_named_tif_is_refused_by_name(tmp_path: Path) -> None:
    inner = write_scene(tmp_path / "elsewhere/secret.tif", noise(20, 20))
    write_scene(tmp_path / "in/a.tif", noise(20, 20))
    source = f"<SimpleSource><SourceFilename>{inner}</SourceFilename><SourceBand>1</SourceBand></SimpleSource>"
    band = f'<VRTRasterBand dataType="Byte" band="1">{source}</VRTRasterBand>'
    (tmp_path / "in/b.tif").write_text(f'<VRTDataset rasterXSize="20" rasterYSize="20">{band}</VRTDataset>')
    tiles, (skipped,) = read_scenes([str(tmp_path / "in")])
    assert [tile.image_id for tile in tiles] == [str(tmp_path / "in/a.tif")]
    assert skipped.file == str(tmp_path / "in/b.tif")
    assert "rasterio cannot open it" in skipped.reason


def test_a_scene_of_more_tiles_than_anybody_means_is_refused_before_they_are_listed() -> None:
    with pytest.raises(
        ImageProblem, match=r"2000000000 x 2000000000 pixels make 61,035,156,250,000 tiles, more than 1,000,000"
    ):
        Tiling().windows(2_000_000_000, 2_000_000_000)
    assert len(Tiling(tile_px=2, overlap_px=1).windows(1001, 1001)) == MOST_TILES
    with pytest.raises(ImageProblem, match="1,001,000 tiles"):
        Tiling(tile_px=2, overlap_px=1).windows(1002, 1001)


@pytest.mark.filterwarnings("error")
def test_a_scene_without_a_place_is_opened_without_a_warning(tmp_path: Path) -> None:
    with pytest.warns(rasterio.errors.NotGeoreferencedWarning):
        scene = write_scene(tmp_path / "scene.tif", noise(20, 20), crs=None, transform=rasterio.Affine.identity())
    ((tile,), _) = read_scenes([str(scene)])
    assert load_image(tile).size == (20, 20)


@pytest.mark.parametrize(
    ("crs", "transform"),
    [
        ('LOCAL_CS["mine",UNIT["metre",1]]', (2, 0, 400000, 0, -2, 5800000)),
        ("IAU_2015:49900", (0.01, 0, 10, 0, -0.01, 10)),  # Mars
        ("EPSG:4326", (1, 0, 0, 0, 1, 0)),  # pixels
        ("EPSG:4326", (1, 0, 0, 0, 1, 100)),
        ("EPSG:32633", (0, 0, 4e5, 0, 0, 58e5)),
    ],
)
def test_one_odd_place_ends_no_job(tmp_path: Path, crs: str, transform: tuple[float, ...]) -> None:
    write_scene(tmp_path / "in/a.tif", noise(20, 30), crs=crs, transform=rasterio.Affine(*transform))
    write_scene(tmp_path / "in/b.tif", noise(20, 30))
    (odd, other), skipped = read_scenes([str(tmp_path / "in")])
    assert skipped == []
    assert "bbox" in other.metadata["geo"]
    assert ("bbox" in odd.metadata["geo"]) == (crs == "EPSG:32633")
    assert load_image(odd).size == (30, 20)
    assert outlines([odd.metadata])[0] is None or crs == "EPSG:32633"


def test_footprints_across_the_antimeridian_and_over_a_pole() -> None:
    # UTM zone 1 begins at 180 degrees west, 360 km from this left edge.
    across = footprint("EPSG:32601", (200_000, 7_200_000, 450_000, 7_300_000))
    west, _, east, _ = across["bbox"]
    assert west > 170
    assert east < -170
    assert [len(ring) for ring in across["footprint"]["coordinates"]] == [1, 1]
    assert {point[0] for part in across["footprint"]["coordinates"] for point in part[0]} == {west, 180.0, -180.0, east}
    pole = footprint("EPSG:3413", (-100_000, -100_000, 100_000, 100_000))
    assert pole["bbox"][0] == -180
    assert pole["bbox"][2:] == [180, 90]
    assert footprint("nonsense", (0, 0, 1, 1)) == {}


def test_footprints_lie_within_their_bbox() -> None:
    found = footprint("EPSG:32633", (400_000, 5_800_000, 500_000, 5_900_000))
    west, south, east, north = found["bbox"]
    for longitude, latitude in found["footprint"]["coordinates"][0]:
        assert west - 1e-6 <= longitude <= east + 1e-6
        assert south - 1e-6 <= latitude <= north + 1e-6


@pytest.mark.parametrize(
    ("bounds", "bbox", "parts"),
    [
        ((190, 10, 200, 20), [-170, 10, -160, 20], 1),
        ((175, 10, 185, 20), [175, 10, -175, 20], 2),
        ((-190, 10, -175, 20), [170, 10, -175, 20], 2),
        ((170, 10, 180.00005, 20), [170, 10, 180, 20], 1),
        ((10, 85, 20, 90.0001), [10, 85, 20, 90], 1),
        ((-100, -10, 90, 10), [-100, -10, 90, 10], 1),
        ((-180.125, -90.125, 179.875, 90.125), [-180, -90, 180, 90], 1),
        ((0, -90, 360, 90), [-180, -90, 180, 90], 1),
    ],
)
@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:4269"])
def test_degrees_beyond_180_are_wrapped_and_beyond_90_cut(
    crs: str, bounds: tuple[float, ...], bbox: list[float], parts: int
) -> None:
    found = footprint(crs, bounds)
    assert found["bbox"] == pytest.approx(bbox, abs=1e-5)  # a metre: NAD83 is not quite WGS84
    assert len(shapely.get_parts(outline_of(found))) == parts
    assert outline_of(found).buffer(1e-5).covers(shapely.box(*(bbox[:3] if parts == 1 else [*bbox[:2], 180]), bbox[3]))


def test_degrees_that_are_pixels_are_no_place() -> None:
    assert footprint("EPSG:4326", (0, 0, 100, 100)) == {}


@pytest.mark.parametrize("crs", ["EPSG:3413", "EPSG:3031", "EPSG:3995", "EPSG:32601", "EPSG:3857", "EPSG:6933"])
def test_no_point_of_a_tile_lies_outside_its_outline(crs: str) -> None:
    """Tiles with a pole inside, on a corner or an edge, near one, and across the antimeridian."""
    random = np.random.default_rng(7)
    (centre_x, centre_y), (edge_x, edge_y) = CENTRES[crs]
    for side in (25_600.0, 100_000.0):
        starts = [(dx * side, dy * side) for dx in (-1, -0.5, 0, 0.01, 1.2) for dy in (-1, 0, 0.01)]
        starts = [(x + centre_x, y + centre_y) for x, y in starts] + [(edge_x - side / 3, edge_y)]
        for west, south in starts:
            bounds = (west, south, west + side, south + side)
            outline = outline_of(footprint(crs, bounds)).buffer(1e-6)
            inside = random.uniform(bounds[:2], bounds[2:], (60, 2))
            longitudes, latitudes = rasterio.warp.transform(crs, "EPSG:4326", *inside.T)
            points = shapely.points([(x + 180) % 360 - 180 for x in longitudes], latitudes)
            # straight lines between the points of an outline leave its true curves a little
            assert shapely.distance(outline, points).max() < 1e-3 * np.sqrt(outline.area), bounds


def test_a_turned_raster_has_the_outline_of_its_corners(tmp_path: Path) -> None:
    step = np.sqrt(2)  # east and north of a pixel of 2 m that lies at 45 degrees
    turned = rasterio.Affine(step, step, 400000, step, -step, 5800000)
    scene = write_scene(tmp_path / "scene.tif", noise(100, 100), transform=turned)
    tiles, _ = read_scenes([str(scene)], Tiling(tile_px=50))
    geo = tiles[1].metadata["geo"]  # the second of the first row
    pixels = ((50, 0), (100, 0), (100, 50), (50, 50))
    assert geo["corners"] == [pytest.approx((400000 + step * (x + y), 5800000 + step * (x - y))) for x, y in pixels]
    longitudes, latitudes = rasterio.warp.transform("EPSG:32633", "EPSG:4326", *zip(*geo["corners"], strict=True))
    drawn = shapely.Polygon(zip(longitudes, latitudes, strict=True))
    outline = outline_of(geo)
    assert outline.symmetric_difference(drawn).area < 1e-3 * drawn.area
    assert outlines([{"geo": {name: geo[name] for name in ("crs", "bounds", "corners")}}]) == [outline.wkb]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tile_px": 0}, "tile_px: 0"),
        ({"overlap_px": 256}, "overlap_px: 256"),
        ({"max_nodata": 2.0}, "max_nodata: 2.0"),
    ],
)
def test_wrong_tilings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tiling(**settings)


# ---- STAC


def write_catalog(folder: Path) -> Path:
    """A catalogue with a collection of two items, one of which lacks its raster, and a link to nothing."""
    pystac = pytest.importorskip("pystac", reason="pystac (extra stac) is not installed")
    catalog = pystac.Catalog("archive", "scenes")
    extent = pystac.Extent(pystac.SpatialExtent([[-180, -90, 180, 90]]), pystac.TemporalExtent([[None, None]]))
    collection = pystac.Collection("lakes", "scenes of lakes", extent)
    catalog.add_child(collection)
    when = datetime.datetime(2021, 5, 4, tzinfo=datetime.timezone.utc)
    for number in range(2):
        item = pystac.Item(f"item{number}", None, None, when, {})
        item.add_asset("preview", pystac.Asset("./preview.png", media_type="image/png"))
        if number == 0:
            item.add_asset("data", pystac.Asset("./scene.tif", media_type=pystac.MediaType.COG, roles=["data"]))
        collection.add_item(item)
    catalog.normalize_and_save(str(folder), pystac.CatalogType.SELF_CONTAINED)
    write_scene(folder / "lakes/item0/scene.tif", noise(40, 80))
    content = json.loads((folder / "catalog.json").read_text())
    content["links"] += [{"rel": "item", "href": "./gone.json"}, {"rel": "child", "href": "./catalog.json"}]
    (folder / "catalog.json").write_text(json.dumps(content))
    return folder / "catalog.json"


def test_a_catalogue_gives_the_tiles_of_its_items(tmp_path: Path) -> None:
    tiles, skipped = read_stac(str(write_catalog(tmp_path)), tiling=Tiling(tile_px=40))
    assert len(tiles) == 2
    assert tiles[0].metadata["meta"] == {"date": "2021-05-04T00:00:00+00:00"}
    assert tiles[0].metadata["stac"] == {"item": "item0", "collection": "lakes"}
    assert sorted(Path(row.file).name for row in skipped) == ["gone.json", "item1.json"]
    assert "no GeoTIFF asset; it has preview" in {row.reason for row in skipped}
    with pytest.raises(EvalDataError, match=r"no tile can be used; first .*no asset 'nir'"):
        read_stac(str(tmp_path / "lakes/collection.json"), asset="nir")


def item(name: Any = "i", href: Any = "./a.tif", **changes: Any) -> dict[str, Any]:
    """An item with one asset; `properties`, `assets`, ... in place of its own."""
    asset = {"href": href, "type": "image/tiff; application=geotiff", "roles": ["data"]}
    content = {"type": "Feature", "stac_version": "1.0.0", "id": name, "geometry": None, "links": []}
    return {**content, "properties": {"datetime": "2021-05-04T23:30:00Z"}, "assets": {"data": asset}, **changes}


def write_items(path: Path, *items: Any, **more: Any) -> str:
    """An item collection beside a scene `a.tif`."""
    pytest.importorskip("pystac", reason="pystac (extra stac) is not installed")
    if not (path.parent / "a.tif").exists():
        write_scene(path.parent / "a.tif", noise(20, 20))
    path.write_text(json.dumps({"type": "FeatureCollection", "features": items, **more}))
    return str(path)


def test_times_of_items_are_kept_in_utc(tmp_path: Path) -> None:
    times = ("2021-05-04T23:30:00Z", "2021-05-05T01:30:00+03:00", "2021-05-04T23:30:00")
    items = [item(str(number), properties={"datetime": time}) for number, time in enumerate(times)]
    tiles, _ = read_stac(write_items(tmp_path / "items.json", *items))
    assert [tile.metadata["meta"]["date"][:19] for tile in tiles] == [
        "2021-05-04T23:30:00",
        "2021-05-04T22:30:00",
        "2021-05-04T23:30:00",
    ]
    assert all(tile.metadata["meta"]["date"].endswith("+00:00") for tile in tiles)


def test_addresses_of_items_are_taken_as_they_stand(tmp_path: Path) -> None:
    """No patterns and no folders, and relative to the item collection."""
    names = ("t[1].tif", "noext", "q.tif?sig=abc")
    folder = tmp_path / "in"
    whole = write_scene(folder / "a.tif", noise(20, 20)).read_bytes()
    for name in names:
        (folder / name).write_bytes(whole)
    addresses = [*(f"./{name}" for name in names), str(folder / "a.tif"), ".", "./*.tif"]
    path = write_items(folder / "items.json", *(item(str(number), href) for number, href in enumerate(addresses)))
    for asset in (None, "data"):
        tiles, skipped = read_stac(path, asset=asset)
        assert [tile.image_id for tile in tiles] == [f"{folder}/{name}" for name in (*names, "a.tif")]
        assert [row.file for row in skipped] == [f"{path}: 4", f"{path}: 5"]


def test_items_that_cannot_be_read_are_named_and_the_others_read(tmp_path: Path) -> None:
    bad = [
        item(assets={"data": {"href": "./a.tif", "type": 5}}),
        item(assets={"data": {"href": "./a.tif", "type": "image/tiff", "roles": 5}}),
        item(properties={"datetime": None, "start_datetime": "yesterday"}),
        item(properties={"datetime": None, "start_datetime": 5}),
        item(properties={"datetime": "4 May 21 or so"}),
        item(assets=[]),
        item(name=None),
        "no item",
    ]
    path = write_items(tmp_path / "items.json", *bad, item("good"))
    tiles, skipped = read_stac(path)
    assert [tile.metadata["stac"]["item"] for tile in tiles] == ["good"]
    assert [row.file for row in skipped] == [f"{path}: i"] * 6 + [f"{path}: item {place} of 9" for place in (7, 8)]
    assert all(row.reason.startswith("not a STAC item that can be read: ") for row in skipped)
    with pytest.raises(EvalDataError, match=r"no tile can be used; first .*: i: no asset 'nir'; it has data\.$"):
        read_stac(write_items(tmp_path / "items.json", item()), asset="nir")


def test_a_span_from_the_year_1_is_no_date(tmp_path: Path) -> None:
    """As `search --format stac` writes it of images without one."""
    for start, meta in (("0001-01-01", None), ("2020-06-30", {"date": "2020-06-30T00:00:00+00:00"})):
        span = {"start_datetime": f"{start}T00:00:00Z", "end_datetime": "9999-12-31T23:59:59Z"}
        (tile,), _ = read_stac(write_items(tmp_path / "items.json", item(properties={"datetime": None, **span})))
        assert tile.metadata.get("meta") == meta


def test_pages_of_items_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    further = {"rel": "next", "href": "./second.json"}
    first = write_items(tmp_path / "first.json", item("i"), links=[further])
    write_items(tmp_path / "second.json", item("j"), links=[{"rel": "next", "href": "./first.json"}])
    extent = {"spatial": {"bbox": [[-180, -90, 180, 90]]}, "temporal": {"interval": [[None, None]]}}
    collection = {"type": "Collection", "stac_version": "1.0.0", "id": "c", "description": "x", "license": "x"}
    links = [{"rel": "items", "href": "./first.json"}]
    (tmp_path / "collection.json").write_text(json.dumps({**collection, "extent": extent, "links": links}))
    for address in (first, str(tmp_path / "collection.json")):
        tiles, skipped = read_stac(address)
        assert [tile.metadata["stac"]["item"] for tile in tiles] == ["i", "j"]
        assert skipped == []
    monkeypatch.setattr(stac, "_MOST_PAGES", 1)
    with pytest.raises(EvalDataError, match=r"first\.json: more than 1 pages of items"):
        read_stac(first)
    write_items(tmp_path / "first.json", item("i"), links=[{**further, "method": "POST"}])
    with pytest.raises(EvalDataError, match=r"first\.json: its link `next` is to be asked by POST, and only GET is"):
        read_stac(first)


def test_items_in_a_store_that_fails_end_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(streams.RETRIES_VARIABLE, "0")
    with flaky_store(monkeypatch) as store:
        path = write_items(tmp_path / "items.json", item("i"), item("j", f"{store}/b.tif"))
        tiles, skipped = read_stac(path)
        assert (len(tiles), len(skipped)) == (1, 1)
        FlakyFileSystem.failures = [True]
        with pytest.raises(streams.StreamError, match=rf"{store}/b\.tif: failed 1 times"):
            read_stac(path)


class Flaky(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; the first two requests of each file fail."""

    asked: dict[str, int]

    def do_GET(self) -> None:
        self.asked[self.path] = self.asked.get(self.path, 0) + 1
        if self.path.endswith((".json", ".tif")) and self.asked[self.path] < 3:
            self.send_error(503)
        else:
            super().do_GET()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    handler = type("Handler", (Flaky,), {"asked": {}})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path))) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_a_catalogue_over_http_that_fails_twice_and_then_works(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_catalog(tmp_path)
    monkeypatch.setattr("msa_openclip.data.streams.time.sleep", lambda _: None)
    tiles, _ = read_stac(f"{server}/lakes/collection.json", tiling=Tiling(tile_px=40))
    assert len(tiles) == 2
    assert load_image(tiles[0]).size == (40, 40)


def test_signed_addresses_and_pages_over_http(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("msa_openclip.data.streams.time.sleep", lambda _: None)
    signed = f"{server}/a.tif?sig=abc"
    write_items(tmp_path / "first.json", item("i", signed), links=[{"rel": "next", "href": "second.json?page=2"}])
    write_items(tmp_path / "second.json", item("j", "./a.tif?sig=def"))
    tiles, skipped = read_stac(f"{server}/first.json")
    assert skipped == []
    assert [tile.image_id for tile in tiles] == [signed, f"{server}/a.tif?sig=def"]
    assert load_image(tiles[0]).size == (20, 20)
    ((tile,), _) = read_scenes([signed])
    assert tile.image_id == signed


def test_what_is_no_stac_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pystac", reason="pystac (extra stac) is not installed")
    (tmp_path / "x.json").write_text('{"type": "Nonsense"}')
    with pytest.raises(EvalDataError, match=r"x\.json: not a STAC object"):
        read_stac(str(tmp_path / "x.json"))
    with pytest.raises(EvalDataError, match=r"absent\.json: not a STAC object that can be read"):
        read_stac(str(tmp_path / "absent.json"))
