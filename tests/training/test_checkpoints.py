"""Checkpoints that a kill left half-written."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import open_clip_train.params
import pytest
import torch

from msa_openclip.data.checkpoint_files import is_whole
from msa_openclip.training.checkpoints import set_aside_half_written


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run with two whole checkpoints."""
    checkpoints = tmp_path / "run/checkpoints"
    checkpoints.mkdir(parents=True)
    for epoch in (1, 2):
        torch.save({"epoch": epoch, "state_dict": {"w": torch.zeros(2000)}}, checkpoints / f"epoch_{epoch}.pt")
    return checkpoints


@pytest.mark.parametrize("share", [0, 0.0005, 0.1, 0.5, 0.9, 0.9999])
def test_a_cut_checkpoint_is_not_whole(folder: Path, share: float) -> None:
    path = folder / "epoch_2.pt"
    data = path.read_bytes()
    assert is_whole(path)
    path.write_bytes(data[: int(share * len(data))])
    assert not is_whole(path)
    path.write_bytes(bytes(len(data)))  # as some file systems leave it after a power failure
    assert not is_whole(path)
    assert not is_whole(folder / "epoch_9.pt")


def test_a_flipped_byte_of_the_directory_is_an_answer_too(folder: Path) -> None:
    path = folder / "epoch_2.pt"
    data = path.read_bytes()
    answers = set()
    for place in range(data.index(b"PK\x01\x02"), len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x80]) + data[place + 1 :])
        answers.add(is_whole(path))
    assert answers == {False, True}  # of an attribute or a time nothing depends


def test_a_version_that_nobody_writes_is_set_aside(folder: Path) -> None:
    path = folder / "epoch_2.pt"
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 6] = 128  # version needed to extract: 12.8
    path.write_bytes(data)
    assert set_aside_half_written(folder) == [path]


def test_formats_of_old_are_taken_as_they_are(folder: Path) -> None:
    torch.save({"w": torch.zeros(3)}, folder / "old.pt", _use_new_zipfile_serialization=False)
    assert is_whole(folder / "old.pt")


def test_half_written_ones_are_set_aside_by_name(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "epoch_3.pt").write_bytes((folder / "epoch_2.pt").read_bytes()[:3000])
    (folder / "tmp.pt").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert {path.name for path in set_aside_half_written(folder)} == {"epoch_3.pt", "tmp.pt"}
    assert f"{folder}/epoch_3.pt is half-written, set aside as epoch_3.pt.incomplete" in caplog.text
    assert sorted(path.name for path in folder.iterdir()) == [
        "epoch_1.pt", "epoch_2.pt", "epoch_3.pt.incomplete", "tmp.pt.incomplete",
    ]  # fmt: skip
    assert set_aside_half_written(folder) == set_aside_half_written(folder / "absent") == []


@pytest.mark.parametrize(
    ("model", "resume", "kept"),
    [("MSA-tiny-ViT", "latest", False), ("MSA-tiny-ViT", "x.pt", True), ("tiny-ViT", "latest", True)],
)
def test_only_runs_of_msa_models_that_take_the_latest_do_so(
    folder: Path, tiny_configs: Path, model: str, resume: str, kept: bool
) -> None:
    half = folder / "epoch_3.pt"
    half.write_bytes(b"PK\x03\x04")
    logs: Any = ["--logs", str(folder.parents[1]), "--name", "run"]
    assert open_clip_train.params.parse_args(["--model", model, "--resume", resume, *logs]).resume == resume
    assert half.exists() == kept
