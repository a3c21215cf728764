"""The synthetic scenes: the same for the same seed, told apart by their captions, and the captions are true."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.shards_data import shard_bytes, tar_members
from PIL import Image

from msa_openclip.shards import ShardError
from msa_openclip.shards.command_line import main
from msa_openclip.shards.synthetic import scenes
from msa_openclip.shards.synthetic.scenes import CLASSES, scene, synthesize


def test_a_scene_depends_on_seed_split_and_index_alone() -> None:
    first, again = scene(3), scene(3)
    assert first.captions == again.captions
    assert first.image.tobytes() == again.image.tobytes()
    for other in (scene(3, seed=1), scene(3, split="val"), scene(3 + len(CLASSES))):
        assert other.label == first.label
        assert other.image.tobytes() != first.image.tobytes()


@pytest.mark.parametrize("size_px", [32, 96, 601])
def test_every_class_draws_at_any_size(size_px: int) -> None:
    for index, label in enumerate(CLASSES):
        drawn = scene(index, size_px=size_px)
        assert drawn.label == label
        assert drawn.image.size == (size_px, size_px)
        assert np.asarray(drawn.image).std() > 10


def test_captions_tell_scenes_apart() -> None:
    drawn_scenes = [scene(index, size_px=32) for index in range(40 * len(CLASSES))]
    assert all(len(drawn.captions) == 5 for drawn in drawn_scenes)
    assert all(re.fullmatch(r"[A-Z][a-z ,]+\.", caption) for drawn in drawn_scenes for caption in drawn.captions)
    whole = [drawn.captions[4] for drawn in drawn_scenes]  # the caption that names large, middle and small
    assert len(set(whole)) > 0.98 * len(whole)


def test_the_sea_lies_where_the_caption_says() -> None:
    for index in range(CLASSES.index("beach"), 20 * len(CLASSES), len(CLASSES)):
        drawn = scene(index)
        grey = np.asarray(drawn.image.convert("L"), dtype=float)
        if "sea on the right" in drawn.captions[4] or "sea at the bottom" in drawn.captions[4]:
            grey = grey[::-1, ::-1]
        if "sea at the" in drawn.captions[4]:
            grey = grey.T
        assert grey[:, :30].mean() < grey[:, 55:75].mean() - 30, (index, drawn.captions[4])


def test_bare_ground_scenes_show_as_many_white_tanks_as_the_caption_counts() -> None:
    numbers = ("no", "one", "two", "three", "four", "five", "six", "seven")
    checked = 0
    for index in range(CLASSES.index("storage tanks"), 60 * len(CLASSES), len(CLASSES)):
        drawn = scene(index, size_px=192)
        said = re.search(r"(\w+) round white storage tanks? on bare soil", drawn.captions[4].lower())
        if said:
            count = numbers.index(said[1])
            lid = np.pi * ((0.093 if count > 3 else 0.1) * 0.93 * 192) ** 2
            lids = (np.asarray(drawn.image).min(axis=2) > 206).sum() / lid
            assert lids == pytest.approx(count, abs=0.45)
            checked += 1
    assert checked >= 3


def test_synthesize_writes_what_build_reads_and_shards_directly(tmp_path: Path) -> None:
    path = synthesize(str(tmp_path / "files"), {"train": 12, "val": 2}, size_px=32)
    rows = json.loads(Path(path).read_text())["images"]
    assert [row["split"] for row in rows] == ["train"] * 12 + ["val"] * 2
    assert main(["build", path, str(tmp_path / "a"), "--workers", "1", "--quiet"]) == 0
    arguments = ["--train", "12", "--val", "2", "--test", "0", "--size-px", "32", "--shards", "image"]
    assert main(["synthesize", str(tmp_path / "b"), *arguments]) == 0
    assert shard_bytes(tmp_path / "a") == shard_bytes(tmp_path / "b") != {}
    name, data = tar_members(tmp_path / "b/val-000000.tar")[0]
    assert name.endswith(".jpg")
    assert Image.open(io.BytesIO(data)).size == (32, 32)
    metadata = json.loads(tar_members(tmp_path / "b/val-000000.tar")[2][1])
    assert metadata["class"] in CLASSES


@pytest.mark.parametrize(("dates", "name"), [(1, "val_000000.jpg"), (2, "val_000000_2001.jpg")])
def test_images_of_others_are_not_overwritten(tmp_path: Path, dates: int, name: str) -> None:
    theirs = tmp_path / "images" / name
    theirs.parent.mkdir()
    theirs.write_bytes(b"mine")
    with pytest.raises(ShardError, match=rf"{name}: is not of synthetic scenes and stays"):
        synthesize(str(tmp_path), {"train": 2, "val": 1}, size_px=32, dates=dates)
    assert [path.name for path in tmp_path.rglob("*")] == ["images", name]
    assert theirs.read_bytes() == b"mine"


def test_scenes_that_a_kill_left_are_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = scenes._drawn

    def killed(index: int, *arguments: Any) -> Any:
        if index:
            raise KeyboardInterrupt
        return drawn(index, *arguments)

    monkeypatch.setattr(scenes, "_drawn", killed)
    with pytest.raises(KeyboardInterrupt):
        synthesize(str(tmp_path), {"train": 2}, size_px=32)
    monkeypatch.undo()
    assert (tmp_path / "images/train_000000.jpg").exists()
    assert len(json.loads(Path(synthesize(str(tmp_path), {"train": 2}, size_px=32)).read_text())["images"]) == 2


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"counts.*trian"):
        synthesize(str(tmp_path), {"trian": 3})
    with pytest.raises(ShardError, match="size_px: 8 is below 32"):
        synthesize(str(tmp_path), {"train": 3}, size_px=8)
