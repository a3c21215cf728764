"""`msa-openclip index --scenes` and `--stac`: tiles of GeoTIFFs in an index, cut on the fly."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from helpers.retrieval_data import randomise

from msa_openclip.commands.main import main
from msa_openclip.evaluation.loading import load
from msa_openclip.search.index import ImageIndex

rasterio = pytest.importorskip("rasterio", reason="rasterio (extra geo) is not installed")


@pytest.fixture
def spec(tiny_configs: Path, tmp_path: Path) -> str:
    path = tmp_path / "msa.pt"
    torch.save(randomise(open_clip.create_model("MSA-tiny-ViT"), seed=3).state_dict(), path)
    return f"MSA-tiny-ViT={path}"


def write_scene(path: Path, seed: int, empty_columns: int = 0) -> None:
    values = np.random.default_rng(seed).integers(1, 255, (3, 64, 128), dtype=np.uint8)
    values[:, :, :empty_columns] = 0
    where = {"crs": "EPSG:32633", "transform": rasterio.Affine(2, 0, 400000, 0, -2, 5800000)}
    size = {"width": 128, "height": 64, "count": 3, "dtype": "uint8", "nodata": 0}
    path.parent.mkdir(exist_ok=True)
    with rasterio.open(path, "w", driver="GTiff", **size, **where) as out:
        out.write(values)


def test_scenes_are_indexed_by_tiles_once(spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_scene(tmp_path / "scenes/a.tif", 0)
    write_scene(tmp_path / "scenes/b.tif", 1, empty_columns=64)
    index = str(tmp_path / "index")
    command = ["index", spec, index, "--scenes", str(tmp_path / "scenes"), "--tile-px", "32", "--segment-images", "3"]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "12 images, 12 of them new" in printed.out
    assert printed.err.count("b.tif (") == 4
    assert "100% of its pixels have no data" in printed.err
    assert main(command) == 0
    assert "12 images, 0 of them new" in capsys.readouterr().out
    opened = ImageIndex(index, load(spec))
    assert {image.location.window for image in opened.images if image.location.url.endswith("b.tif")} == {
        (left, top, 32, 32) for left in (64, 96) for top in (0, 32)
    }
    assert all(len(image.metadata["geo"]["bbox"]) == 4 for image in opened.images)


def test_a_scene_that_changed_is_not_added_again(spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scene = tmp_path / "scenes/a.tif"
    write_scene(scene, 0)
    command = ["index", spec, str(tmp_path / "index"), "--scenes", str(scene), "--tile-px", "64"]
    assert main(command) == 0
    write_scene(scene, 1)
    os.utime(scene, ns=(1, 1))
    capsys.readouterr()
    assert main(command) == 1
    assert "2 images are not what they were when they were indexed" in capsys.readouterr().err


def test_a_scene_of_another_size_is_a_changed_one(
    spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where it is one tile, whose window is another then."""
    scene = tmp_path / "scenes/a.tif"
    write_scene(scene, 0)
    command = ["index", spec, str(tmp_path / "index"), "--scenes", str(scene)]
    assert main([*command, "--tile-px", "128"]) == 0
    write_scene(scene, 1)
    os.utime(scene, ns=(1, 1))
    capsys.readouterr()
    assert main([*command, "--tile-px", "64"]) == 1
    assert "2 images are not what they were when they were indexed" in capsys.readouterr().err


def test_more_tiles_of_a_known_scene_whatever_its_rights_and_path(
    spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_scene(tmp_path / "scenes/a.tif", 0)
    assert main(["index", spec, "index", "--scenes", "scenes/a.tif", "--tile-px", "64"]) == 0
    (tmp_path / "scenes/a.tif").chmod(0o600)
    assert main(["index", spec, "index", "--scenes", str(tmp_path / "scenes/a.tif"), "--tile-px", "32"]) == 0
    assert "10 images, 8 of them new" in capsys.readouterr().out


def test_two_windows_under_one_name_are_two_images(
    spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_scene(tmp_path / "a.tif", 0)
    row = "field,a.tif,{},0,32,32\n"
    for name, columns in (("one", (0,)), ("other", (32,)), ("both", (0, 32, 32))):
        lines = "".join(row.format(column) for column in columns)
        (tmp_path / f"{name}.csv").write_text(f"id,href,col_off,row_off,width,height\n{lines}")
    command = ["index", spec, str(tmp_path / "index"), "--windows"]
    for name, expected in (("one", "1 images, 1 of"), ("other", "2 images, 1 of"), ("both", "2 images, 0 of")):
        assert main([*command, str(tmp_path / f"{name}.csv")]) == 0
        printed = capsys.readouterr()
        assert expected in printed.out
    assert "left out: field: it occurs twice in the list" in printed.err
    opened = ImageIndex(str(tmp_path / "index"), load(spec))
    assert sorted(image.location.window for image in opened.images) == [(0, 0, 32, 32), (32, 0, 32, 32)]


def test_wrong_tiles_are_refused(spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_scene(tmp_path / "scenes/a.tif", 0)
    command = ["index", spec, str(tmp_path / "index"), "--scenes", str(tmp_path / "scenes")]
    assert main([*command, "--overlap-px", "256"]) == 1
    assert "overlap_px: 256 must be at least 0 and less than tile_px 256" in capsys.readouterr().err
    assert main([*command, "--max-nodata", "2"]) == 2
    assert "'2' is not a number from 0 to 1" in capsys.readouterr().err
