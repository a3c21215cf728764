"""Tiny shards whose images and captions say which they are, and arguments to read them by."""

from __future__ import annotations

import io
import json
import re
import tarfile
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

Members = list[tuple[str, bytes]]


def image_bytes(number: int, kind: str = "PNG") -> bytes:
    """An image of one colour, which is its number."""
    out = io.BytesIO()
    Image.new("RGB", (2, 3), (7, number // 256, number % 256)).save(out, kind)
    return out.getvalue()


def image_number(image: Image.Image) -> Tensor:
    """The inverse, in place of an image transform: (1,)."""
    _, high, low = image.getpixel((0, 0))
    return torch.tensor([256 * high + low])


def caption_numbers(captions: Sequence[str]) -> Tensor:
    """Captions `image 3 caption 2` -> (T, 2), in place of a tokenizer."""
    return torch.tensor([[int(number) for number in re.findall(r"\d+", caption)] for caption in captions])


def caption(number: int, index: int) -> str:
    return f"image {number} caption {index}"


def image_sample(number: int, captions: int) -> Members:
    """A sample of the layout `image`."""
    texts = "\n".join(caption(number, index) for index in range(captions))
    return [(f"k{number:03}.png", image_bytes(number)), (f"k{number:03}.txt", texts.encode())]


def pair_samples(number: int, captions: int) -> Iterable[Members]:
    """The samples of the layout `pair`, one for each caption."""
    for index in range(captions):
        key = f"k{number:03}+{index}"
        yield [(f"{key}.png", image_bytes(number)), (f"{key}.txt", caption(number, index).encode())]


def tar_bytes(members: Members) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def write_shards(
    folder: Path, counts: Sequence[int], *, captions: int = 5, layout: str = "image", sizes: bool = True
) -> str:
    """Shards with `counts` images each, numbered throughout; returns their pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    number, entries = 0, {}
    for shard, count in enumerate(counts):
        samples: list[Members] = []
        for image in range(number, number + count):
            samples += [image_sample(image, captions)] if layout == "image" else list(pair_samples(image, captions))
        name = f"s-{shard:03}.tar"
        (folder / name).write_bytes(tar_bytes([member for sample in samples for member in sample]))
        entries[name] = len(samples)
        number += count
    if sizes:
        (folder / "sizes.json").write_text(json.dumps(entries))
    return f"{folder}/s-{{000..{len(counts) - 1:03}}}.tar"


def arguments(pattern: str, **changes: Any) -> Namespace:
    """What open_clip_train's parser gives for an MSA model that trains and validates on `pattern`."""
    from open_clip_train.params import parse_args

    parsed = parse_args(["--model", "MSA-ViT-Ti", "--train-data", pattern, "--val-data", pattern])
    parsed.rank, parsed.world_size, parsed.distributed = 0, 1, False
    parsed.batch_size, parsed.workers = 4, 0
    for name, value in changes.items():
        assert hasattr(parsed, name), name
        setattr(parsed, name, value)
    return parsed
