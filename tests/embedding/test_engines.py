"""docs/how-to/embed.md: its Python runs as it stands there, at small size, and every engine gives the same vectors."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import open_clip
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch
from helpers.markdown import python_blocks
from helpers.processes import run_new_python
from helpers.retrieval_data import randomise, scene

from msa_openclip.data.readers import read_folder
from msa_openclip.embedding.embedder import Embedder
from msa_openclip.search.exchange import import_partitions
from msa_openclip.search.schema import to_table

COUNT = 7
PAGE = (Path(__file__).parents[2] / "docs/how-to/embed.md").read_text(encoding="utf-8")


@pytest.fixture
def place(tiny_configs: Path, tmp_path: Path) -> Path:
    """A folder with what the page takes as given: a model, images, a table of them."""
    torch.save(randomise(open_clip.create_model("MSA-tiny-ViT"), seed=3).state_dict(), tmp_path / "epoch_9.pt")
    (tmp_path / "tiles").mkdir()
    for number in range(COUNT):
        scene(number).save(tmp_path / "tiles" / f"{number}.jpg")
    return tmp_path


@pytest.fixture
def wanted(place: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Global vectors (COUNT, E) in the order of ids; the folder is the current one from here on."""
    monkeypatch.chdir(place)
    pq.write_table(to_table(read_folder("tiles")), "tiles.parquet")
    columns = Embedder("MSA-tiny-ViT=epoch_9.pt", precision="fp32")(pq.read_table("tiles.parquet"))
    return np.array(columns["global"].to_pylist(), dtype=np.float32)


def run_block(word: str, place: Path, configs: Path) -> str:
    """Run the one block of Python that has a word in it, in a process of its own; what it printed."""
    (block,) = [block for block in python_blocks(PAGE) if word in block]
    environment = {
        **os.environ,
        "MSA_OPENCLIP_CONFIGS": str(configs),
        "PYSPARK_PYTHON": sys.executable,
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_worker_niceness": "0",
        "RAY_ADDRESS": "local",  # not whichever cluster runs on this machine, with a folder of its own
    }
    done = run_new_python("-c", block.replace("MSA-ViT-B=", "MSA-tiny-ViT="), cwd=place, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_vectors(folder: Path, wanted: np.ndarray) -> None:
    table = ds.dataset(folder, format="parquet", exclude_invalid_files=True).to_table().sort_by("id")
    assert table["id"].to_pylist() == [f"{number}.jpg" for number in range(COUNT)]
    found = np.array(table["global"].to_pylist(), dtype=np.float32)
    assert np.allclose(found, wanted, atol=0.01)  # some blocks take bf16 where it is fast


def test_every_block_is_run_here() -> None:
    run = (
        "embed(read_folder",
        "print(columns",
        "map_batches",
        "parallelize",
        "mapInArrow",
        "daft.func",
        "GridGeoSampler(",
        "pq.read_table(path)",
        "to_table",
    )
    assert [sum(word in block for word in run) for block in python_blocks(PAGE)] == [1] * len(run)


def test_one_process(place: Path, wanted: np.ndarray, tiny_configs: Path) -> None:
    assert f"{COUNT} images in 1 partitions, 1 of them new; 0 left out" in run_block(
        "embed(read_folder", place, tiny_configs
    )
    assert_vectors(place / "parts", wanted)
    assert "null" in run_block("print(columns", place, tiny_configs)


def test_the_table_of_an_engine_becomes_an_index(place: Path, wanted: np.ndarray, tiny_configs: Path) -> None:
    (place / "tiles.parquet").unlink()
    run_block("to_table", place, tiny_configs)
    (place / "tiles/7.jpg").write_bytes(b"no image")
    embedder = Embedder("MSA-tiny-ViT=epoch_9.pt", precision="fp32", vectors="float32")
    (place / "vectors").mkdir()
    table = embedder({"id": ["7.jpg"], "source": ["tiles/7.jpg"]}).select(["id", "source", "global", "match", "error"])
    pq.write_table(table, "vectors/unreadable.parquet")
    pq.write_table(embedder(pq.read_table("tiles.parquet")).select(table.column_names), "vectors/whole.parquet")
    run_block("pq.read_table(path)", place, tiny_configs)
    assert import_partitions("tiles.index", ["parts"]) == (COUNT, 0)
    assert_vectors(place / "parts", wanted)


@pytest.mark.parametrize(("word", "engine"), [("map_batches", "ray"), ("mapInArrow", "pyspark"), ("daft.func", "daft")])
def test_a_column_of_an_engine(word: str, engine: str, place: Path, wanted: np.ndarray, tiny_configs: Path) -> None:
    need(engine)
    run_block(word, place, tiny_configs)
    assert_vectors(place / "vectors", wanted)


def test_partitions_on_spark(place: Path, wanted: np.ndarray, tiny_configs: Path) -> None:
    need("pyspark")
    assert f".parquet {COUNT} ()" in run_block("parallelize", place, tiny_configs)
    assert_vectors(place / "parts", wanted)


def test_a_dataset_of_torchgeo(place: Path, tiny_configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("torchgeo")
    rasterio = pytest.importorskip("rasterio", reason="rasterio is not installed (extra geo)")
    (place / "scenes").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (3, 256, 512), dtype=np.uint8)
    where = {"crs": "EPSG:32632", "transform": rasterio.Affine(10, 0, 500_000, 0, -10, 5_400_000)}
    with rasterio.open(
        place / "scenes/0.tif", "w", driver="GTiff", width=512, height=256, count=3, dtype="uint8", **where
    ) as f:
        f.write(pixels)
    run_block("GridGeoSampler(", place, tiny_configs)
    monkeypatch.chdir(place)
    assert import_partitions("tiles.index", ["parts"]) == (2, 0)
    table = ds.dataset("parts").to_table().sort_by("id")
    assert table["id"].to_pylist() == ["500000-5397440-502560-5400000", "502560-5397440-505120-5400000"]
    assert table["bbox"].to_pylist()[0]["xmin"] == pytest.approx(9.0, abs=1e-6)  # the zone's central meridian
    embedder = Embedder("MSA-tiny-ViT=epoch_9.pt")
    picture = pixels[:, :, :256].transpose(1, 2, 0)
    wanted = embedder({"id": ["a"], "source": ["scenes"], "image": [picture]})["global"].to_pylist()
    assert np.allclose(table["global"].to_pylist()[0], wanted, atol=1e-3)


def need(engine: str) -> None:
    pytest.importorskip(engine, reason=f"{engine} is not installed (pip install {engine})")
    if engine == "pyspark" and not shutil.which("java"):
        pytest.skip("Spark needs Java, which is not installed")
