"""An index of seven scenes, six of them with a place on Earth, and the model that built it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from helpers.retrieval_data import randomise, square, write_shards

from msa_openclip.data.readers import read_shards
from msa_openclip.evaluation.loading import LoadedModel, load
from msa_openclip.search.build import build_index


def random_model(folder: Path, seed: int, name: str = "MSA-tiny-ViT") -> LoadedModel:
    """A model with random weights, loaded from a file in `folder`."""
    path = folder / f"{name}-{seed}.pt"
    torch.save(randomise(open_clip.create_model(name), seed=seed).state_dict(), path)
    return load(f"{name}={path}")


@pytest.fixture(scope="package")
def model(tiny_configs: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return random_model(tmp_path_factory.mktemp("weights"), 3)


@pytest.fixture(scope="package")
def stranger(tiny_configs: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Of other weights."""
    return random_model(tmp_path_factory.mktemp("weights"), 4)


@pytest.fixture(scope="package")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pattern of shards."""
    return write_shards(tmp_path_factory.mktemp("scenes"), "image", count=7)


@pytest.fixture(scope="package")
def index(model: LoadedModel, scenes: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """In two segments; scene x lies at 10 + x degrees east, 50 north, on a day of 201x; the last one nowhere."""
    places = [square(10 + x, 50, 0.5) for x in range(6)]
    about = [
        {"geo": {"footprint": place}, "meta": {"date": f"201{x}-06-30", "cloud": x}} for x, place in enumerate(places)
    ]
    images = [replace(i, metadata=known) for i, known in zip(read_shards(scenes), [*about, {}], strict=True)]
    folder = str(tmp_path_factory.mktemp("index") / "tiles.index")
    build_index(model, images, folder, segment_images=4)
    return folder
