"""Sources and targets anywhere, jobs on any engine: always the same bytes."""

from __future__ import annotations

import json
import os
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
from helpers.shards_data import karpathy, real_data, shard_bytes, tar_members

from msa_openclip.shards import BuildOptions, ShardError, build, verify
from msa_openclip.shards.command_line import main

OPTIONS = BuildOptions(shards=3, name="tiny")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = karpathy(tmp_path / "in", {"train": 25, "val": 4})
    (tmp_path / "in/images/5.jpg").write_bytes(b"broken")
    return path


@pytest.fixture
def reference(source: Path, tmp_path: Path) -> dict[str, bytes]:
    """The shards of a plain build on one process."""
    build(str(source), str(tmp_path / "reference"), images=str(source.parent / "images"), options=OPTIONS)
    return shard_bytes(tmp_path / "reference")


def upload(folder: Path, url: str) -> None:
    fs, root = fsspec.core.url_to_fs(url)
    for path in folder.rglob("*"):
        if path.is_file():
            target = f"{root}/{path.relative_to(folder)}"
            fs.makedirs(os.path.dirname(target), exist_ok=True)
            fs.pipe_file(target, path.read_bytes())


def download(url: str) -> dict[str, bytes]:
    fs, root = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    return {name.rsplit("/", 1)[1]: fs.cat_file(name) for name in sorted(fs.find(root))}


def only_shards(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name.endswith(".tar")}


@pytest.mark.parametrize(("engine", "workers"), [("auto", 1), ("process", 2), ("process", 3), ("thread", 2)])
def test_every_engine_writes_the_same_bytes(
    source: Path, reference: dict[str, bytes], tmp_path: Path, engine: str, workers: int
) -> None:
    out = tmp_path / "out"
    images = str(source.parent / "images")
    summary = build(str(source), str(out), images=images, options=OPTIONS, engine=engine, workers=workers)
    assert shard_bytes(out) == reference
    assert summary.rejected == {"unreadable image": 1}
    for name in ("manifest.json", "sizes.json", "rejected.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "reference" / name).read_bytes()


@pytest.mark.filterwarnings("ignore")  # ray's own
def test_ray_writes_the_same_bytes(source: Path, reference: dict[str, bytes], tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    ray = pytest.importorskip("ray", reason="ray (extra) is not installed")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    try:
        images = str(source.parent / "images")
        build(str(source), str(tmp_path / "out"), images=images, options=OPTIONS, engine="ray", workers=2)
    finally:
        ray.shutdown()
    assert shard_bytes(tmp_path / "out") == reference


def test_missing_ray_is_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ShardError, match="ray is not installed; pip install ray, or use --engine process"):
        build(str(source), str(tmp_path / "out"), images=str(source.parent / "images"), engine="ray")


def test_memory_in_memory_out(source: Path, reference: dict[str, bytes]) -> None:
    upload(source.parent, "memory://places/in")
    try:
        arguments: dict[str, Any] = {"images": "memory://places/in/images", "options": OPTIONS}
        captions = "memory://places/in/captions.json"
        build(captions, "memory://places/out", workers=2, **arguments)
        files = download("memory://places/out")
        assert only_shards(files) == reference
        assert set(files) - set(reference) == {"manifest.json", "sizes.json", "rejected.jsonl"}
        assert verify("memory://places/out", workers=2, decode=True).ok
        with pytest.raises(ShardError, match=r"process cannot see memory:// .* --engine thread"):
            build(captions, "memory://places/other", workers=2, engine="process", **arguments)
    finally:
        fsspec.filesystem("memory").rm("/places", recursive=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # botocore's and moto's own
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("workers", [1, 2])
def test_s3_in_s3_out(source: Path, reference: dict[str, bytes], bucket: str, workers: int) -> None:
    upload(source.parent, f"{bucket}/in")
    arguments: dict[str, Any] = {"images": f"{bucket}/in/images", "options": OPTIONS, "workers": workers}
    build(f"{bucket}/in/captions.json", f"{bucket}/out", **arguments)
    files = download(f"{bucket}/out")
    assert only_shards(files) == reference
    assert not [name for name in files if name.endswith(".tmp")]
    assert verify(f"{bucket}/out").ok
    assert build(f"{bucket}/in/captions.json", f"{bucket}/out", **arguments).resumed_shards == 6
    resharded = build(f"{bucket}/out", f"{bucket}/again", options=BuildOptions(shards=1))
    assert resharded.splits["train"]["samples"] == 24


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves a folder without a log."""

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_images_over_http(source: Path, reference: dict[str, bytes], tmp_path: Path) -> None:
    pytest.importorskip("aiohttp", reason="aiohttp (fsspec's http) is not installed")
    (tmp_path / "in/images/7.jpg").unlink()
    handler = partial(QuietHandler, directory=str(tmp_path / "in"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        images = f"http://127.0.0.1:{server.server_port}/images"
        build(str(source), str(tmp_path / "out"), images=images, options=OPTIONS)
    finally:
        server.shutdown()
        server.server_close()
    rejected = {row["file"]: row["detail"] for row in map(json.loads, (tmp_path / "out/rejected.jsonl").open())}
    assert set(rejected) == {"5.jpg", "7.jpg"}
    assert "cannot be read: no such file" in rejected["7.jpg"]
    names = {name for data in (tmp_path / "out").glob("*.tar") for name, _ in tar_members(data)}
    kept = {name for data in (tmp_path / "reference").glob("*.tar") for name, _ in tar_members(data)}
    assert names == kept - {"7.jpg", "7.txt", "7.json"}


def test_unknown_stores_are_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"nowhere://x/c.json: cannot be opened"):
        build("nowhere://x/c.json", str(tmp_path / "out"))


def test_resharding_gives_what_building_would_have(tmp_path: Path) -> None:
    source = karpathy(tmp_path / "in", {"train": 25, "val": 4})
    images = str(source.parent / "images")
    for layout in ("image", "pair"):
        for shards in (2, 5):
            options = BuildOptions(layout=layout, shards=shards)
            build(str(source), str(tmp_path / f"{layout}{shards}"), images=images, options=options)
    for start in ("image5", "pair5"):
        for goal in ("image", "pair"):
            out = tmp_path / f"{start}-{goal}"
            arguments = ["reshard", str(tmp_path / start), str(out), "--layout", goal, "--shards", "2"]
            assert main([*arguments, "--workers", "1", "--quiet"]) == 0
            assert shard_bytes(out) == shard_bytes(tmp_path / f"{goal}2"), (start, goal)


def test_two_data_sets_become_one_though_their_ids_are_alike(tmp_path: Path) -> None:
    for name, captions in (("ucm", 3), ("sydney", 5)):
        source = karpathy(tmp_path / name / "in", {"train": 8}, captions=captions)
        build(str(source), str(tmp_path / name / "shards"), images=str(source.parent / "images"))
        (tmp_path / name / "shards").rename(tmp_path / f"{name}-shards")
    arguments = ["reshard", str(tmp_path / "ucm-shards"), str(tmp_path / "sydney-shards"), str(tmp_path / "both")]
    assert main([*arguments, "--shards", "1", "--workers", "1", "--quiet"]) == 0
    members = dict(tar_members(tmp_path / "both/train-000000.tar"))
    assert len(members) == 3 * 16
    assert len(members["ucm-shards/3.txt"].split(b"\n")) == 3
    assert len(members["sydney-shards/3.txt"].split(b"\n")) == 5


def test_dry_run_estimates_and_writes_nothing(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["build", str(source), str(tmp_path / "out"), "--images", str(source.parent / "images"), "--quiet"]
    assert main([*arguments, "--dry-run", "--shards", "2", "--loader-workers", "3", "--ranks", "2"]) == 0
    printed = capsys.readouterr().out
    assert "train-{000000..000001}.tar" in printed
    assert "2 training shards are fewer than 3 loader workers x 2 ranks = 6" in printed
    assert not (tmp_path / "out").exists()
    options = BuildOptions(shards=2)
    images = str(source.parent / "images")
    guess = build(str(source), str(tmp_path / "out"), images=images, options=options, dry_run=True)
    truth = build(str(source), str(tmp_path / "out"), images=images, options=options)
    assert guess.splits["train"]["size_bytes"] == pytest.approx(truth.splits["train"]["size_bytes"], rel=0.25)


def test_shard_size_and_readers_decide_the_number_of_shards(tmp_path: Path) -> None:
    source = karpathy(tmp_path / "in", {"train": 400})

    def shards(**options: Any) -> int:
        plan = build(str(source), "unused", images=str(source.parent / "images"), options=BuildOptions(**options),
                     dry_run=True)  # fmt: skip
        return int(plan.splits["train"]["shards"])

    assert shards() == 4
    assert shards(loader_workers=3, ranks=4) == 12
    assert 8 <= shards(loader_workers=1, shard_mb=0.2) <= 11  # 400 samples of about 4.5 kB
    assert shards(loader_workers=4, shard_mb=0.2) == 12  # the next multiple of 4
    assert shards(shards=7) == 7


def test_real_ucm_builds_and_verifies_with_every_problem_known(tmp_path: Path) -> None:
    folder = real_data("ucm")
    summary = build(str(folder / "dataset_ucm.json"), str(tmp_path / "out"), images=str(folder / "images"),
                    options=BuildOptions(name="ucm"), workers=2)  # fmt: skip
    assert {split: row["captions"] for split, row in summary.splits.items()} == {
        "train": 8400, "val": 1050, "test": 1050,
    }  # fmt: skip
    assert summary.rejected == {}
    assert verify(str(tmp_path / "out"), workers=2).ok
