"""GeoTIFFs: bands, stretch, nodata, tiles and coordinates come out as the raster has them."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.shards_data import tar_members
from PIL import Image

from msa_openclip.shards import BuildOptions, ImageOptions, ShardError, build
from msa_openclip.shards.imagery import geotiff
from msa_openclip.shards.records import ImageProblem

rasterio = pytest.importorskip("rasterio", reason="rasterio (extra geo) is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def write_scene(path: Path, values: np.ndarray, **profile: Any) -> None:
    """A raster of shape (bands, rows, columns) in UTM zone 33 with pixels of 2 m, unless asked otherwise."""
    names, colormap = profile.pop("names", None), profile.pop("colormap", None)
    profile = {"crs": "EPSG:32633", "transform": rasterio.Affine(2, 0, 400000, 0, -2, 5800000)} | profile
    bands, height, width = values.shape
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path, "w", driver="GTiff", width=width, height=height, count=bands, dtype=values.dtype, **profile
    ) as out:
        if colormap:
            out.write_colormap(1, colormap)
        out.write(values)
        for number, name in enumerate(names or (), start=1):
            out.set_band_description(number, name)


def built(folder: Path, **image: Any) -> dict[str, tuple[np.ndarray, dict[str, Any]]]:
    """Pixels and JSON by key, after a build of one class folder."""
    options = BuildOptions(shards=1, image=ImageOptions(geo=True, **image))
    build(str(folder), str(folder.parent / "out"), options=options)
    members = dict(tar_members(folder.parent / "out/train-000000.tar"))
    keys = [name[:-5] for name in members if name.endswith(".json")]
    return {
        key: (np.asarray(Image.open(io.BytesIO(members[f"{key}.png"]))), json.loads(members[f"{key}.json"]))
        for key in keys
    }


def test_tiles_cover_the_scene_and_know_where_they_are(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 255, (3, 70, 100), dtype=np.uint8)
    write_scene(tmp_path / "in/lake/scene.tif", values)
    tiles = built(tmp_path / "in", tile_px=40)
    assert len(tiles) == 2 * 3
    covered = np.zeros((70, 100), dtype=bool)
    for key, (pixels, metadata) in tiles.items():
        left, top, width, height = metadata["geo"]["window"]
        assert (width, height) == (40, 40)
        assert np.array_equal(pixels, np.moveaxis(values[:, top : top + 40, left : left + 40], 0, -1))
        covered[top : top + 40, left : left + 40] = True
        bounds = [400000 + 2 * left, 5800000 - 2 * (top + 40), 400000 + 2 * (left + 40), 5800000 - 2 * top]
        assert metadata["geo"]["bounds"] == bounds
        assert metadata["geo"]["crs"] == "EPSG:32633"
        assert metadata["geo"]["gsd_m"] == 2.0
        assert metadata["geo"]["scene"] == "scene.tif"
        assert metadata["image_id"] == key.replace("%2E", ".")
        assert metadata["captions"][0] == "a satellite photo of lake."
    assert covered.all()


def test_bands_by_name_and_by_number_agree(tmp_path: Path) -> None:
    values = np.random.default_rng(1).integers(0, 255, (5, 16, 16), dtype=np.uint8)
    for name, bands in (("a", ("nir", "red", "green")), ("b", ("5", "3", "2"))):
        write_scene(tmp_path / name / "in/c/x.tif", values, names=["blue", "green", "red", "edge", "nir"])
        pixels, metadata = built(tmp_path / name / "in", bands=bands)["c/x"]
        assert metadata["geo"]["bands"] == [5, 3, 2]
        assert np.array_equal(pixels, np.moveaxis(values[[4, 2, 1]], 0, -1))


def test_untold_nodata_of_floats_is_not_stretched(tmp_path: Path) -> None:
    values = np.tile(np.linspace(100, 200, 64, dtype=np.float32), (1, 64, 1))
    values[:, :20] = np.finfo(np.float32).min
    write_scene(tmp_path / "in/c/x.tif", values)
    ((shown, _),) = built(tmp_path / "in").values()
    assert (shown[:20] == 0).all()
    assert shown[30].min() < 10
    assert shown[30].max() > 245


def test_sixteen_bits_are_stretched_between_percentiles_of_the_scene_without_nodata(tmp_path: Path) -> None:
    values = np.random.default_rng(2).integers(2000, 4000, (1, 64, 64)).astype(np.uint16)
    values[0, :20] = 0
    write_scene(tmp_path / "in/c/x.tif", values, nodata=0)
    whole, _ = built(tmp_path / "in", stretch=("10", "90"))["c/x"]
    low, high = np.percentile(values[0, 20:], (10, 90))
    expected = np.clip((values[0, 20:] - low) / (high - low), 0, 1) * 255
    assert np.abs(whole[20:] - expected).max() <= 1
    assert (whole[:20] == 0).all()


def test_a_pixel_has_data_where_any_band_has(tmp_path: Path) -> None:
    values = np.zeros((3, 8, 8), dtype=np.uint8)
    values[1, 2:], values[2, 2:] = 80, 160  # without red; the first two rows are empty
    write_scene(tmp_path / "in/c/x.tif", values, nodata=0)
    pixels, _ = built(tmp_path / "in")["c/x"]
    assert np.array_equal(pixels, np.moveaxis(values, 0, -1))


def test_what_one_band_has_not_measured_is_black_in_that_band_alone(tmp_path: Path) -> None:
    values = np.random.default_rng(4).uniform(10, 20, (3, 16, 16)).astype(np.float32)
    values[0, 0, 0], values[1, 0, 0], values[2, 0, 0] = np.inf, np.finfo(np.float32).max, 20
    write_scene(tmp_path / "in/c/x.tif", values)
    pixels, _ = built(tmp_path / "in")["c/x"]
    assert pixels[0, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_paletted_scenes_show_their_colours(tmp_path: Path, dtype: str) -> None:
    values = np.random.default_rng(5).integers(1, 7, (1, 8, 8)).astype(dtype)
    values[0, 0] = 0
    colours = {value: (255 - value, 200, 40 * value, 255) for value in range(7)}
    write_scene(tmp_path / "in/c/x.tif", values, colormap=colours, photometric="palette", nodata=0)
    pixels, metadata = built(tmp_path / "in")["c/x"]
    assert metadata["geo"]["bands"] == [1]
    expected = np.array([[colours[int(value)][:3] for value in row] for row in values[0]])
    expected[0] = 0  # no data is black, whatever the palette says of it
    assert np.array_equal(pixels, expected)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits_reach_from_black_to_white(tmp_path: Path, bits: int) -> None:
    values = np.random.default_rng(6).integers(0, 2**bits, (1, 16, 16), dtype=np.uint8)
    write_scene(tmp_path / "in/c/x.tif", values, nbits=bits)
    pixels, _ = built(tmp_path / "in")["c/x"]
    grey = pixels[..., 0] if pixels.ndim == 3 else pixels
    assert np.array_equal(grey, values[0] * (255 // (2**bits - 1)))


def test_tiles_of_a_scene_are_stretched_alike_and_empty_ones_rejected(tmp_path: Path) -> None:
    values = np.full((1, 32, 96), 1000, dtype=np.uint16)
    values[:, :, 32:64] = 3000
    values[:, :, 64:] = 0
    write_scene(tmp_path / "in/c/x.tif", values, nodata=0)
    tiles = built(tmp_path / "in", tile_px=32, stretch=("0", "100"))
    assert {key: int(pixels.mean()) for key, (pixels, _) in tiles.items()} == {
        "c/x_r000_c000": 0, "c/x_r000_c001": 255,
    }  # fmt: skip
    row = json.loads((tmp_path / "out/rejected.jsonl").read_text())
    assert (row["reason"], row["detail"]) == ("unreadable image", "every pixel is nodata")


def test_degrees_become_metres(tmp_path: Path) -> None:
    transform = rasterio.Affine(0.001, 0, 13.0, 0, -0.001, 60.0)
    write_scene(tmp_path / "in/c/x.tif", np.ones((3, 4, 4), dtype=np.uint8), crs="EPSG:4326", transform=transform)
    metadata = built(tmp_path / "in")["c/x"][1]
    # at 60 degrees a degree of longitude is half as long as one of latitude
    assert metadata["geo"]["gsd_m"] == pytest.approx(111.32 * np.sqrt(0.5), rel=1e-3)


def test_absent_bands_and_broken_files_are_rows(tmp_path: Path) -> None:
    write_scene(tmp_path / "in/c/x.tif", np.ones((1, 8, 8), dtype=np.uint8))
    write_scene(tmp_path / "in/c/y.tif", np.ones((3, 8, 8), dtype=np.uint8), names=["red", "green", "blue"])
    (tmp_path / "in/c/z.tif").write_bytes(b"II*\0nothing")
    tiles = built(tmp_path / "in", bands=("red", "green", "blue"))
    assert list(tiles) == ["c/y"]
    rows = {row["file"]: row["detail"] for row in map(json.loads, (tmp_path / "out/rejected.jsonl").open())}
    assert "band 'red' does not exist; there are 1 bands" in rows["c/x.tif"]
    assert "rasterio cannot open it" in rows["c/z.tif"]


@pytest.mark.parametrize("name", ["a.tif.aux.xml", "a.tif.msk", "a.tif.ovr", "a.tfw"])
def test_a_pipe_beside_a_scene_is_refused_unopened(tmp_path: Path, name: str) -> None:
    write_scene(tmp_path / "a.tif", np.ones((3, 4, 4), np.uint8))
    os.mkfifo(tmp_path / name)
    with pytest.raises(ImageProblem, match=f"{name}: not a regular file"):
        geotiff.open_scene(str(tmp_path / "a.tif"))


def test_tiled_builds_are_equal_byte_for_byte_with_more_workers(tmp_path: Path) -> None:
    values = np.random.default_rng(3).integers(0, 4000, (3, 60, 60)).astype(np.uint16)
    write_scene(tmp_path / "in/c/x.tif", values)
    options = BuildOptions(shards=2, image=ImageOptions(geo=True, tile_px=20))
    for workers in (1, 2):
        build(str(tmp_path / "in"), str(tmp_path / f"{workers}"), options=options, workers=workers)
    for file in ("train-000000.tar", "train-000001.tar"):
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes()


def test_missing_rasterio_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_scene(tmp_path / "in/c/x.tif", np.ones((3, 8, 8), dtype=np.uint8))
    monkeypatch.setitem(__import__("sys").modules, "rasterio", None)
    with pytest.raises(ShardError, match="pip install rasterio"):
        built(tmp_path / "in", tile_px=4)
