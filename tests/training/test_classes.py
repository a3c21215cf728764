"""Scene classes travel from shards to the loss where it compares them, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import stream_data
from helpers.stream_data import Members, arguments, image_sample, stop_workers, tar_bytes

from msa_openclip.model.labelled import LabelledTexts, class_number
from msa_openclip.training.loader import get_wds_dataset
from msa_openclip.training.shares import ShardDataError

CLASSES = ("airport", "lake", "airport", "farm", "lake")


def shard(folder: Path, metadata: list[bytes | None]) -> str:
    """One shard of images, each with its KEY.json where there is one; its path."""
    members: Members = []
    for number, content in enumerate(metadata):
        members += image_sample(number, 2)
        members += [] if content is None else [(f"k{number:03}.json", content)]
    path = folder / "s-000.tar"
    path.write_bytes(tar_bytes(members))
    (folder / "sizes.json").write_text(json.dumps({path.name: len(metadata)}))
    return str(path)


def batches(
    pattern: str, *, classes: bool, workers: int = 0
) -> list[tuple[torch.Tensor, LabelledTexts | torch.Tensor]]:
    args = arguments(pattern, batch_size=len(CLASSES), workers=workers)
    tokenizer = stream_data.caption_numbers
    data = get_wds_dataset(args, stream_data.image_number, is_train=True, tokenizer=tokenizer, classes=classes)
    data.set_epoch(0)
    try:
        return list(data.dataloader)
    finally:
        stop_workers(data)


@pytest.mark.parametrize("workers", [0, 1])
def test_texts_come_with_the_classes_of_their_images(workers: int, tmp_path: Path) -> None:
    pattern = shard(tmp_path, [json.dumps({"class": name}).encode() for name in CLASSES])
    ((images, texts),) = batches(pattern, classes=True, workers=workers)
    assert isinstance(texts, LabelledTexts)
    assert texts.classes.tolist() == [class_number(CLASSES[number]) for number in images[:, 0].tolist()]
    assert texts.texts[:, 0].equal(images[:, 0])
    ((_, plain),) = batches(pattern, classes=False, workers=workers)
    assert isinstance(plain, torch.Tensor)


@pytest.mark.parametrize("content", [None, b"{}", b'{"class": 3}', b"[]", b"{"])
def test_a_sample_without_a_class_is_named(content: bytes | None, tmp_path: Path) -> None:
    pattern = shard(tmp_path, [content] * 5)
    with pytest.raises(
        ShardDataError, match=r"s-000.tar: sample k00\d: (has no class, and msa_cfg|its JSON is not read)"
    ):
        batches(pattern, classes=True)
    assert len(batches(pattern, classes=False)) == 1
