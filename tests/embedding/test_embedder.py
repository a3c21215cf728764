"""One class for every engine: rows that name images -> the same rows with vectors."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from helpers.retrieval_data import randomise, scene

from msa_openclip.data.pixels import image_pixels
from msa_openclip.data.readers import read_folder
from msa_openclip.data.streams import StreamError
from msa_openclip.embedding.embedder import Embedder, EmbedError
from msa_openclip.evaluation import encoder
from msa_openclip.evaluation.loading import LoadedModel, ModelError, load
from msa_openclip.search.schema import to_table, vectors

COUNT = 7


@pytest.fixture
def spec(tiny_configs: Path, tmp_path: Path) -> str:
    path = tmp_path / "msa.pt"
    torch.save(randomise(open_clip.create_model("MSA-tiny-RN"), seed=3).state_dict(), path)
    return f"MSA-tiny-RN={path}"


@pytest.fixture
def model(spec: str) -> LoadedModel:
    return load(spec)


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    folder = tmp_path / "tiles"
    folder.mkdir()
    for number in range(COUNT):
        scene(number).save(folder / f"{number}.png")
    return folder


def test_vectors_are_those_of_the_scorer(model: LoadedModel, tiles: Path) -> None:
    images = read_folder(str(tiles))
    embedder = Embedder(model, precision="fp32", batch_size=3, readers=2)
    columns = embedder(to_table(images))
    features, projected = vectors(columns, embedder.product)
    wanted = model.scorer.project(torch.stack([image_pixels(image, model.preprocess) for image in images]))
    assert np.allclose(features, wanted[0], atol=1e-3)
    assert wanted[1] is not None
    assert projected is not None
    assert np.allclose(projected, wanted[1], atol=2e-3, rtol=2e-3)
    assert columns["id"].to_pylist() == [f"{number}.png" for number in range(COUNT)]
    assert columns["error"].null_count == COUNT


@pytest.mark.parametrize("kind", ["dict", "pandas", "arrow", "record batch", "one by one"])
def test_batches_of_every_kind_give_the_same(model: LoadedModel, tiles: Path, kind: str) -> None:
    embedder = Embedder(model, precision="fp32", batch_size=1)
    table = to_table(read_folder(str(tiles)))
    expected = embedder(table)
    if kind == "one by one":
        import pyarrow as pa

        assert pa.concat_tables([embedder(table.slice(row, 1)) for row in range(COUNT)]) == expected
        return
    batch: Any = {
        "dict": lambda: {"id": np.array(table["id"]), "source": table["source"].to_pylist()},
        "pandas": lambda: table.to_pandas(),
        "arrow": lambda: table.select(["id", "source"]),
        "record batch": lambda: table.combine_chunks().to_batches()[0],
    }[kind]()
    found = embedder(batch)
    for name in ("id", "source", "global", "match"):
        assert found[name].to_pylist() == expected[name].to_pylist()


def test_columns_of_the_user_are_passed_on_and_pictures_taken(model: LoadedModel, tiles: Path) -> None:
    embedder = Embedder(model, precision="fp32")
    files = embedder(to_table(read_folder(str(tiles))))
    pictures = {
        "id": [str(number) for number in range(3)],
        "source": ["memory"] * 3,
        "cloud": [0.1, 0.2, 0.3],
        "image": [np.asarray(scene(0)), scene(1), (tiles / "2.png").read_bytes()],
    }
    found = embedder(pictures)
    assert found["cloud"].to_pylist() == [0.1, 0.2, 0.3]
    assert "image" not in found.column_names
    assert np.allclose(np.array(found["global"].to_pylist()), np.array(files["global"].to_pylist())[:3], atol=1e-3)


def test_what_cannot_be_read_keeps_its_row_and_says_why(model: LoadedModel, tiles: Path) -> None:
    (tiles / "2.png").write_bytes((tiles / "2.png").read_bytes()[:40])
    (tiles / "5.png").write_bytes(b"")
    columns = Embedder(model, batch_size=2)(to_table(read_folder(str(tiles))))
    errors = columns["error"].to_pylist()
    assert [number for number, error in enumerate(errors) if error] == [2, 5]
    assert "2.png: image 2.png cannot be read" in errors[2]
    assert [value is None for value in columns["global"].to_pylist()] == [bool(error) for error in errors]
    assert [value is None for value in columns["match"].to_pylist()] == [bool(error) for error in errors]
    assert columns.schema == Embedder(model)(to_table(read_folder(str(tiles))).slice(2, 1)).schema  # none can be read


def test_bf16_is_near_and_leaves_the_model_as_it_is(model: LoadedModel, tiles: Path) -> None:
    table = to_table(read_folder(str(tiles)))
    before = {name: value.clone() for name, value in model.scorer.model.state_dict().items()}
    plain, fast = Embedder(model, precision="fp32"), Embedder(model, precision="bf16")
    one, other = (np.array(embedder(table)["global"].to_pylist(), dtype=float) for embedder in (plain, fast))
    assert (one * other).sum(axis=1).min() > 0.999
    assert np.allclose(np.linalg.norm(other, axis=1), 1, atol=2**-11)  # the rounding of half precision
    assert plain.product.fingerprint == fast.product.fingerprint
    assert (plain.product.settings["precision"], fast.product.settings["precision"]) == ("fp32", "pure_bf16")
    for name, value in model.scorer.model.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


def test_auto_takes_bf16_where_the_processor_has_it(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for has, precision in ((True, "pure_bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        assert Embedder(model).product.settings["precision"] == precision
        assert encoder.fastest_precision(torch.device("mps")) == "fp32"


def test_a_plain_clip_model_has_no_match(tiny_configs: Path, tiles: Path) -> None:
    embedder = Embedder("tiny-ViT=untrained", vectors="float32", precision="bf16")
    columns = embedder(to_table(read_folder(str(tiles))))
    assert "match" not in columns.column_names
    assert columns["global"].type.value_type == "float"
    assert embedder.product.match_shape is None


def test_a_pickle_is_the_name_of_the_model(spec: str, tiles: Path) -> None:
    embedder = Embedder(spec, precision="fp32", batch_size=2)
    pickled = pickle.dumps(embedder)
    assert len(pickled) < 5000
    table = to_table(read_folder(str(tiles)))
    assert pickle.loads(pickled)(table) == embedder(table)


def test_a_pickle_refuses_another_model(spec: str) -> None:
    before = Embedder(spec)
    pickled = pickle.dumps(before)
    torch.save(randomise(open_clip.create_model("MSA-tiny-RN"), seed=4).state_dict(), spec.partition("=")[2])
    assert Embedder(spec).product.fingerprint != before.product.fingerprint  # the file's weights, not those before
    with pytest.raises(ModelError, match="here it is another model"):
        pickle.loads(pickled)


def test_a_store_that_cannot_be_reached_is_no_unreadable_image(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MSA_OPENCLIP_RETRIES", "0")
    with pytest.raises(StreamError, match="failed 1 times"):
        Embedder(model)({"id": ["a"], "source": ["http://127.0.0.1:9/a.png"]})
    absent = Embedder(model)({"id": ["a"], "source": ["memory://nowhere/a.png"]})
    assert "FileNotFoundError" in absent["error"][0].as_py()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"id": ["a"]}, "column 'source': missing"),
        ({"id": ["a", None], "source": ["a", "b"]}, "column 'id': missing, or null in a row"),
        ({"id": [1], "source": ["a"]}, "column 'id': .* expected string"),
        ({"id": ["a"], "source": ["a"], "window": [7]}, "column 'window'"),
    ],
)
def test_wrong_batches_are_refused(model: LoadedModel, batch: Any, message: str) -> None:
    with pytest.raises(EmbedError, match=message):
        Embedder(model)(batch)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"precision": "int8"}, "precision: 'int8' is unknown; choose one of auto, fp32, bf16"),
        ({"vectors": "int8"}, "vectors: 'int8' is unknown"),
        ({"batch_size": 0}, "batch_size: 0 must be at least 1"),
        ({"readers": 0}, "readers: 0 must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused(model: LoadedModel, how: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Embedder(model, **how)
