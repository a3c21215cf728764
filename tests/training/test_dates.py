"""Change pairs through the loader of either host: stacked samples, equal crops, refusals by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from helpers import tiny
from helpers.host import images_and_texts
from helpers.stream_data import arguments, caption_numbers, image_bytes, image_number, tar_bytes
from open_clip_train.data import get_wds_dataset

from msa_openclip.training import loader
from msa_openclip.training.shares import ShardDataError


@pytest.fixture(scope="module")
def pairs_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Name of a tiny model of two dates."""
    folder = tmp_path_factory.mktemp("configs")
    tiny.write_config(folder, "MSA-tiny-pairs", tiny.config(msa={"dates": 2}))
    open_clip.add_model_config(folder)
    return "MSA-tiny-pairs"


def write_pairs(folder: Path, counts: list[int], *, dates: int = 2) -> str:
    """Shards whose sample n shows n at the first date, n + 100 at the second, ...; returns their pattern."""
    number = 0
    for shard, count in enumerate(counts):
        members = []
        for _ in range(count):
            for date in range(dates):
                members.append((f"k{number:03}.{date}.png", image_bytes(number + 100 * date)))
            members.append((f"k{number:03}.txt", f"image {number} caption 0\nimage {number} caption 1".encode()))
            number += 1
        (folder / f"s-{shard:03}.tar").write_bytes(tar_bytes(members))
    return f"{folder}/s-{{000..{len(counts) - 1:03}}}.tar"


def read(pattern: str, *, is_train: bool = True, dates: int = 2, **changes: Any) -> list[tuple[Any, Any]]:
    """All batches of an epoch."""
    args = arguments(pattern, train_num_samples=8, **changes)
    data = loader.get_wds_dataset(args, image_number, is_train, tokenizer=caption_numbers, dates=dates)
    return list(data.dataloader)


@pytest.mark.parametrize("is_train", [True, False])
def test_samples_come_stacked_with_their_caption(tmp_path: Path, is_train: bool) -> None:
    batches = read(write_pairs(tmp_path, [5, 3]), is_train=is_train)
    images, texts = (torch.cat(part) for part in zip(*batches, strict=True))
    assert images.shape == (8 if is_train else 16, 2, 1)
    assert images[:, 0, 0].equal(texts[:, 0])
    assert images[:, 1, 0].equal(texts[:, 0] + 100)
    assert sorted(set(texts[:, 0].tolist())) == list(range(8))


@pytest.mark.parametrize(
    ("there", "asked", "what"),
    [(2, 1, "2 dates, and the model takes 1"), (2, 3, "2 dates, and the model takes 3"), (3, 2, "3 dates, and the")],
)
def test_another_number_of_dates_is_refused_before_all_else(tmp_path: Path, there: int, asked: int, what: str) -> None:
    with pytest.raises(ShardDataError, match=rf"no sample can be used. Found: 2 x {what}.*msa_cfg.dates"):
        read(write_pairs(tmp_path, [2], dates=there), dates=asked)


def test_single_images_are_refused_by_a_model_of_pairs(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes([("k.png", image_bytes(1)), ("k.txt", b"one")]))
    with pytest.raises(ShardDataError, match=r"1 dates, and the model takes 2 \(msa_cfg.dates\), first .*sample k"):
        read(f"{tmp_path}/a.tar")


def test_a_pair_of_which_one_date_does_not_decode_is_replaced_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    members = [("k0.0.png", image_bytes(0)), ("k0.1.png", b"no image"), ("k0.txt", b"image 0 caption 0")]
    members += [("k1.0.png", image_bytes(1)), ("k1.1.png", image_bytes(101)), ("k1.txt", b"image 1 caption 0")]
    members += [("k2.0.png", image_bytes(2)), ("k2.2.png", image_bytes(102)), ("k2.txt", b"image 2 caption 0")]
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    batches = read(f"{tmp_path}/a.tar")
    assert {int(number) for images, _ in batches for number in images[:, 1, 0]} == {101}
    assert "sample k0: image cannot be decoded" in caplog.text
    assert "sample k2: no image of date 1 among the members 0.png, 2.png, txt" in caplog.text


def test_the_hosts_loader_learns_of_the_dates_from_the_models_configuration(tmp_path: Path, pairs_model: str) -> None:
    args = arguments(write_pairs(tmp_path, [8]), train_num_samples=8, model=pairs_model)
    args.val_data = None
    (batch, *_) = get_wds_dataset(args, image_number, True, tokenizer=caption_numbers).dataloader
    assert images_and_texts(batch)[0].shape == (4, 2, 1)
