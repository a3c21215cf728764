"""Fuzz targets of the package's own readers: index files, model configurations, a run's results and parameters.

Whatever the bytes are, a reader takes them or raises its own error, which names the file; an index answers with
finite numbers.  `make fuzz-package` runs them for an hour with fresh seeds; here they run for seconds.  `index_corpus`
holds each case that was found.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from helpers.retrieval_data import randomise, write_shards
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from msa_openclip.config import MSACfg
from msa_openclip.data.readers import read_shards
from msa_openclip.evaluation.loading import LoadedModel, load
from msa_openclip.evaluation.run_parameters import RunError, read_parameters
from msa_openclip.plugin.configs import _usable
from msa_openclip.reports.run_selection import best_epoch
from msa_openclip.search.build import build_index
from msa_openclip.search.checksums import checksums
from msa_openclip.search.files import ImageIndexError, sealed
from msa_openclip.search.index import ImageIndex
from msa_openclip.search.searcher import Searcher
from msa_openclip.search.verify import verify_index

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))
CORPUS = Path(__file__).parent / "index_corpus"
fuzz = settings(
    max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=True
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=8,
)
mutations = st.lists(
    st.tuples(st.sampled_from(["flip", "cut", "insert", "zero"]), st.floats(0, 1), st.binary(min_size=1, max_size=9)),
    min_size=1,
    max_size=4,
)


@contextmanager
def only(kind: type[Exception], named: str) -> Iterator[None]:
    """Nothing is raised in here but errors of a kind that name something, on a line that can be read."""
    try:
        yield
    except kind as error:
        if named not in str(error) or len(str(error)) > 2000:
            raise AssertionError(f"an error that helps nobody: {str(error)[:300]}") from error


def mutated(data: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    """Bytes with a few changes at relative places."""
    for kind, at, content in changes:
        place = int(at * len(data))
        if kind == "flip":
            data = (
                data[:place]
                + bytes(a ^ b for a, b in zip(data[place:], content, strict=False))
                + data[place + len(content) :]
            )
        elif kind == "cut":
            data = data[:place]
        elif kind == "insert":
            data = data[:place] + content + data[place:]
        else:
            data = data[:place] + bytes(len(content)) + data[place + len(content) :]
    return data


@pytest.fixture(scope="module")
def model(tiny_configs: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    path = tmp_path_factory.mktemp("weights") / "msa.pt"
    torch.save(randomise(open_clip.create_model("MSA-tiny-ViT"), seed=3).state_dict(), path)
    return load(f"MSA-tiny-ViT={path}")


@pytest.fixture(scope="module")
def whole(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index")
    build_index(model, read_shards(write_shards(folder / "scenes", count=5)), str(folder / "index"))
    return folder / "index"


def reseal(index: Path) -> None:
    """Make all checksums right again, as whoever forges an index would."""
    manifest = json.loads((index / "index.json").read_text())
    for row in manifest["segments"]:
        folder = index / row["name"]
        segment = json.loads((folder / "segment.json").read_text())
        segment["files"] = {name: checksums(folder / name) for name in segment["files"]}
        (folder / "segment.json").write_text(json.dumps(segment))
        row["checksum"] = hashlib.sha256((folder / "segment.json").read_bytes()).hexdigest()
    (index / "index.json").write_text(json.dumps(sealed(manifest)))


def ask(index: Path, model: LoadedModel) -> None:
    """Open, search and verify: finite answers or the index's own error."""
    with only(ImageIndexError, str(index)):
        (hits,) = Searcher(ImageIndex(str(index), model)).by_text(["harbor number 3"], k=5)
        assert all(math.isfinite(hit.score) for hit in hits)
    verify_index(str(index))


@fuzz
@given(
    name=st.sampled_from(["index.json", "segment.json", "tiles.parquet", "features.npy", "projected.npy"]),
    changes=mutations,
    forged=st.booleans(),
)
def test_index_files(
    name: str, changes: list[tuple[str, float, bytes]], forged: bool, whole: Path, model: LoadedModel
) -> None:
    copy = whole.parent / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(whole, copy)
    path = next(copy.rglob(name))
    path.write_bytes(mutated(path.read_bytes(), changes))
    if forged and name not in ("index.json", "segment.json"):
        reseal(copy)
    ask(copy, model)


@fuzz
@given(
    change=st.dictionaries(st.sampled_from(["name", "images", "checksum", "x"]), json_values, min_size=1),
    top=json_values,
)
def test_forged_manifests(change: dict[str, Any], top: Any, whole: Path, model: LoadedModel) -> None:
    copy = whole.parent / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(whole, copy)
    manifest = json.loads((copy / "index.json").read_text())
    manifest["segments"][0] |= change
    for content in (manifest, manifest | {"segments": top}, manifest | {"settings": top}, top):
        text = json.dumps(sealed(content) if isinstance(content, dict) else content)
        (copy / "index.json").write_text(text)
        ask(copy, model)


SETTINGS = {"image_scales": [{"stage": 1}], "width": 24, "heads": 4, "loss": {}, "score": {}, "ranking": {}}


@fuzz
@given(
    changes=st.dictionaries(st.sampled_from([*SETTINGS, "preset", "fusion", "x"]), json_values, max_size=3),
    inner=st.dictionaries(st.sampled_from(["temperature", "margin", "match_weight", "form"]), json_values, max_size=2),
)
def test_model_settings(changes: dict[str, Any], inner: dict[str, Any]) -> None:
    for content in (SETTINGS | changes, SETTINGS | {"loss": inner}, SETTINGS | {"score": inner}):
        with only(ValueError, "msa_cfg"):
            MSACfg.from_dict(content)


@fuzz
@given(data=st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
def test_configuration_files(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "odd.json"
    path.write_bytes(data)
    config = _usable(path, set())
    assert config is None or {"embed_dim", "vision_cfg", "text_cfg"} <= config.keys()


@fuzz
@given(
    lines=st.lists(
        st.binary(max_size=60) | json_values.map(lambda value: json.dumps({"epoch": 1, "m": value}).encode())
    )
)
def test_results_and_parameters(lines: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> None:
    run = tmp_path_factory.getbasetemp() / "run"
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run / "checkpoints" / "epoch_1.pt").write_bytes(b"x")
    (run / "params.txt").write_text("model: tiny-ViT\n")
    (run / "checkpoints" / "results.jsonl").write_bytes(b"\n".join(lines))
    with only(RunError, str(run)):
        assert math.isfinite(best_epoch(str(run), "m").value)
    (run / "params.txt").write_bytes(b"model: x\n" + b"\n".join(b"a: " + line for line in lines))
    with only(RunError, str(run)):
        read_parameters(run)


@pytest.mark.parametrize("case", sorted(CORPUS.glob("*.json")), ids=lambda path: path.stem)
def test_corpus_of_index_files(case: Path, whole: Path, model: LoadedModel) -> None:
    """Cases that were found: a file of the index and what was put in its place."""
    content = json.loads(case.read_text())
    copy = whole.parent / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(whole, copy)
    next(copy.rglob(content["file"])).write_bytes(base64.b64decode(content["base64"]))
    if content["forged"]:
        reseal(copy)
    ask(copy, model)
