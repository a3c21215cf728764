"""`msa-openclip embed`: from sources to partitions, in one process, by ranks, on Ray with a killed worker."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.retrieval_data import randomise, scene, write_shards

from msa_openclip.commands.embed import _device_of_rank
from msa_openclip.commands.main import main

COUNT = 24


@pytest.fixture
def spec(tiny_configs: Path, tmp_path: Path) -> str:
    path = tmp_path / "msa.pt"
    torch.save(randomise(open_clip.create_model("MSA-tiny-ViT"), seed=3).state_dict(), path)
    return f"MSA-tiny-ViT={path}"


@pytest.fixture
def tiles(tmp_path: Path) -> str:
    (tmp_path / "tiles").mkdir()
    for number in range(COUNT):
        scene(number).save(tmp_path / "tiles" / f"{number:02}.png")
    return str(tmp_path / "tiles")


def rows(folder: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("*.parquet")))


def test_every_source_is_embedded_once(
    spec: str, tiles: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_shards(tmp_path / "data")
    for number, source in enumerate((["--folder", tiles], ["--shards", shards])):
        command = ["embed", spec, str(tmp_path / f"parts{number}"), *source, "--partition-images", "5"]
        assert main(command) == 0
        count = len(rows(tmp_path / f"parts{number}"))
        new = -(-count // 5)
        assert f"{count} images in {new} partitions, {new} of them new, 0 images left out" in capsys.readouterr().out
        assert main(command) == 0
        assert f"{count} images in {new} partitions, 0 of them new" in capsys.readouterr().out
    assert main(["embed", spec, str(tmp_path / "parts")]) == 2
    assert "--shards --folder --scenes --stac --windows is required" in capsys.readouterr().err


def test_scenes_keep_their_places(spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rasterio = pytest.importorskip("rasterio", reason="rasterio (extra geo) is not installed")
    values = np.random.default_rng(0).integers(1, 255, (3, 64, 128), dtype=np.uint8)
    where = {"crs": "EPSG:32633", "transform": rasterio.Affine(2, 0, 400000, 0, -2, 5800000)}
    (tmp_path / "scenes").mkdir()
    for name in ("a.tif", "b.tif"):
        size = {
            "width": 128,
            "height": 64,
            "count": 3,
            "dtype": "uint8",
            "tiled": True,
            "blockxsize": 32,
            "blockysize": 32,
        }
        with rasterio.open(tmp_path / "scenes" / name, "w", driver="GTiff", **size, **where) as out:
            out.write(values)
    whole = (tmp_path / "scenes/b.tif").read_bytes()
    (tmp_path / "scenes/b.tif").write_bytes(whole[: len(whole) * 6 // 10])  # the download broke off
    command = ["embed", spec, str(tmp_path / "parts"), "--scenes", str(tmp_path / "scenes"), "--tile-px", "32"]
    assert main(command) == 0
    printed = capsys.readouterr()
    found = rows(tmp_path / "parts")
    left_out = 16 - len(found)
    assert 0 < left_out < 8
    assert f"{len(found)} images in 1 partitions, 1 of them new, {left_out} images left out" in printed.out
    assert "left out: " in printed.err
    assert "b.tif (" in printed.err
    assert found["geometry"].null_count == 0
    assert len(set(found["id"].to_pylist())) == len(found)


def test_ranks_share_the_partitions(spec: str, tiles: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["--folder", tiles, "--partition-images", "5"]
    assert main(["embed", spec, str(tmp_path / "one"), *command]) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert main(["embed", spec, str(tmp_path / "two"), *command]) == 0
        assert len(list((tmp_path / "two").glob("*.parquet"))) == (2 if rank == "1" else 5)
    assert rows(tmp_path / "one") == rows(tmp_path / "two")


def test_each_rank_of_torchrun_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _device_of_rank("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [_device_of_rank(name) for name in ("cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:1", "cpu"]


def test_on_ray_a_killed_worker_changes_nothing(
    spec: str, tiles: str, tmp_path: Path, tiny_configs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray", reason="ray (extra ray) is not installed")
    psutil = pytest.importorskip("psutil", reason="psutil is not installed")
    command = ["--folder", tiles, "--partition-images", "1"]
    assert main(["embed", spec, str(tmp_path / "here"), *command]) == 0
    settings = {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_worker_niceness": "0"}  # else all other tests come first
    environment = {**os.environ, "MSA_OPENCLIP_CONFIGS": str(tiny_configs), **settings}
    on_ray = [sys.executable, "-m", "msa_openclip", "embed", spec, str(tmp_path / "ray"), *command, "--engine", "ray"]
    process = subprocess.Popen(
        [*on_ray, "--workers", "2"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    killed: list[int] = []

    def kill_a_worker() -> None:
        while process.poll() is None and not killed:
            if len(list((tmp_path / "ray").glob("*.parquet"))) >= 2:
                workers = [
                    child
                    for child in psutil.Process(process.pid).children(recursive=True)
                    if "MapWorker" in " ".join(child.cmdline())
                ]
                killed.extend(worker.pid for worker in workers[:1])
                for worker in workers[:1]:
                    worker.kill()
            time.sleep(0.005)

    killer = threading.Thread(target=kill_a_worker)
    killer.start()
    said, _ = process.communicate(timeout=600)
    killer.join()
    assert process.returncode == 0, said
    assert killed
    assert f"{COUNT} images in {COUNT} partitions" in said
    assert rows(tmp_path / "ray") == rows(tmp_path / "here")
