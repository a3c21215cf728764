"""Shards in real training processes: local and S3, workers forked and spawned, one and two ranks, and bad data."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers.processes import run_new_python
from helpers.stream_data import image_bytes, image_sample, tar_bytes, write_shards

from msa_openclip.data.streams import CACHE_VARIABLE, RETRIES_VARIABLE
from msa_openclip.training.validation import EVALUATE_VARIABLE

pytestmark = pytest.mark.timeout(660)

IMAGES, CAPTIONS, BATCH = 19, 3, 4


class Run:
    """A finished `open_clip_train.main`."""

    def __init__(self, done: subprocess.CompletedProcess[str], folder: Path, seconds: float) -> None:
        self.code, self.output, self.seconds = done.returncode, done.stdout + done.stderr, seconds
        self.notes = [list(map(json.loads, path.read_text().splitlines())) for path in sorted(folder.glob("rank*"))]
        results = folder / "run" / "checkpoints" / "results.jsonl"
        self.validations = list(map(json.loads, results.read_text().splitlines())) if results.exists() else []


@pytest.fixture
def train(tmp_path: Path, tiny_configs: Path):  # type: ignore[no-untyped-def]
    def run(
        data: str,
        *more: str,
        workers: int = 0,
        ranks: int = 1,
        start: str = "fork",
        epochs: int = 2,
        torchrun: bool = False,
        **environment: str,
    ) -> Run:
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone", "--"]
        spy = Path(__file__).parents[1] / "helpers" / "spy_on_training.py"
        command = [
            *(launcher if torchrun else []), str(spy), str(tmp_path), start,
            "--model", "MSA-tiny-ViT", "--dataset-type", "webdataset",
            "--train-data", data, "--val-data", data, "--batch-size", str(BATCH), "--workers", str(workers),
            "--epochs", str(epochs), "--name", "run", "--device", "cpu", *more,
        ]  # fmt: skip
        env = {
            **os.environ,
            "MSA_OPENCLIP_CONFIGS": str(tiny_configs),
            EVALUATE_VARIABLE: "off",
            **environment,
        }
        begin = time.monotonic()
        done = run_new_python(*command, env=env, ranks=1 if torchrun else ranks)
        return Run(done, tmp_path, time.monotonic() - begin)

    return run


def numbers(caption: str) -> tuple[int, int]:
    """Image and caption of `image 1 9 caption 2`; the tokenizer takes numbers apart."""
    match = re.fullmatch(r"image ([\d ]+) caption (\d)", caption)
    assert match is not None, caption
    return int(match[1].replace(" ", "")), int(match[2])


def assert_every_sample_once(run: Run, ranks: int) -> None:
    assert run.code == 0, run.output
    assert len(run.notes) == ranks
    drawn = []
    for epoch in range(2):
        captions = [caption for notes in run.notes for caption in notes[epoch]]
        pairs = set(map(numbers, captions))
        assert len(pairs) == IMAGES, "one caption of each image"
        assert {image for image, _ in pairs} == set(range(IMAGES))
        assert len(captions) < IMAGES + BATCH * ranks
        assert max(Counter(captions).values()) <= 2
        drawn.append(pairs)
    assert not drawn[0] & drawn[1], "another caption in another epoch"
    assert [found["num_samples"] for found in run.validations] == [IMAGES * CAPTIONS] * 2


@pytest.mark.parametrize(("workers", "ranks", "start"), [(0, 1, "fork"), (1, 1, "spawn"), (2, 2, "fork")])
def test_local_shards(train: Any, tmp_path: Path, workers: int, ranks: int, start: str) -> None:
    pattern = write_shards(tmp_path / "shards", (5, 8, 6), captions=CAPTIONS)
    run = train(f"file://{pattern}" if start == "spawn" else pattern, workers=workers, ranks=ranks, start=start)
    assert_every_sample_once(run, ranks)


def upload(folder: Path, bucket: str) -> None:
    import s3fs

    for path in folder.iterdir():
        s3fs.S3FileSystem().put_file(str(path), f"{bucket}/{path.name}")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # botocore's and moto's own
@pytest.mark.parametrize(("workers", "ranks", "cached"), [(2, 1, False), (2, 2, True)])
def test_s3_shards(train: Any, tmp_path: Path, bucket: str, workers: int, ranks: int, cached: bool) -> None:
    upload(Path(write_shards(tmp_path / "shards", (5, 8, 6), captions=CAPTIONS)).parent, bucket)
    environment = {CACHE_VARIABLE: str(tmp_path / "cache")} if cached else {}
    run = train(f"{bucket}/s-{{000..002}}.tar", workers=workers, ranks=ranks, **environment)
    assert_every_sample_once(run, ranks)
    if cached:
        assert sorted(re.sub(r"^[0-9a-f]{16}-", "", path.name) for path in (tmp_path / "cache").iterdir()) == [
            "s-000.tar", "s-001.tar", "s-002.tar",
        ]  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_missing_s3_shard_ends_the_run_with_its_url(train: Any, tmp_path: Path, bucket: str) -> None:
    upload(Path(write_shards(tmp_path / "shards", (5, 8, 6), captions=CAPTIONS)).parent, bucket)
    run = train(f"{bucket}/s-{{000..003}}.tar", "--train-num-samples", "19", workers=2)
    assert run.code != 0
    assert f"{bucket}/s-003.tar: FileNotFoundError. Check the name, the braces" in run.output


def test_a_store_that_does_not_answer_ends_the_run_with_its_url(train: Any) -> None:
    pytest.importorskip("aiohttp", reason="aiohttp is not installed")
    run = train("http://127.0.0.1:9/s-{000..003}.tar", "--train-num-samples", "19", **{RETRIES_VARIABLE: "1"})
    assert run.code != 0
    assert re.search(r"http://127\.0\.0\.1:9/s-000\.tar: failed 2 times, last with Client", run.output)
    assert run.seconds < 120


def test_shards_without_a_usable_sample_stop_all_ranks_within_seconds(train: Any, tmp_path: Path) -> None:
    samples = [member for i in range(9) for member in [(f"{i}.tif", image_bytes(i)), (f"{i}.txt", b"caption")]]
    (tmp_path / "a.tar").write_bytes(tar_bytes(samples))
    run = train(str(tmp_path / "a.tar"), "--train-num-samples", "9", workers=2, ranks=2, torchrun=True)
    assert run.code != 0
    assert "a.tar: no sample can be used. Found: 9 x no image among the members tif, txt" in run.output
    assert run.seconds < 120, "nearly all of it imports"


def test_a_damaged_shard_ends_all_ranks(train: Any, tmp_path: Path) -> None:
    pattern = write_shards(tmp_path / "shards", (5, 8, 6), captions=CAPTIONS)
    path = tmp_path / "shards" / "s-002.tar"
    path.write_bytes(path.read_bytes()[:5000])
    run = train(pattern, workers=2, ranks=2)
    assert run.code != 0
    assert re.search(r"s-002\.tar: damaged, or not a tar \(unexpected end of data\)", run.output)


def test_a_bad_image_is_reported_and_training_goes_on(train: Any, tmp_path: Path) -> None:
    pattern = write_shards(tmp_path / "shards", (5, 8, 6), captions=CAPTIONS)
    samples = [image_sample(number, CAPTIONS) for number in range(5)]
    samples[3][0] = ("k003.png", image_bytes(3)[:40])
    (tmp_path / "shards" / "s-000.tar").write_bytes(tar_bytes([member for sample in samples for member in sample]))
    run = train(pattern, workers=2)
    assert run.code == 0, run.output
    for notes in run.notes[0]:
        assert {numbers(caption)[0] for caption in notes} == set(range(IMAGES)) - {3}
        assert len(notes) == 20
    log = (tmp_path / "run" / "out.log").read_text()
    assert log.count("s-000.tar: sample k003: image cannot be decoded") == 4, "training and validation, two epochs"
