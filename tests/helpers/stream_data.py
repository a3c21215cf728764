"""Tiny shards whose images and captions say which they are, arguments to read them by, and a store that fails."""

from __future__ import annotations

import io
import json
import re
import tarfile
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from open_clip_train.data import DataInfo
from PIL import Image
from torch import Tensor

from msa_openclip.data import streams

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


class FlakyFileSystem(MemoryFileSystem):
    """Memory whose accesses fail now and then, as `FlakyFileSystem.failures` says: True fails, False works."""

    protocol = "flaky"
    cachable = False
    failures: list[bool] = []  # noqa: RUF012 - shared on purpose
    seekable = True
    opened = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("flaky://", "memory://")))

    @classmethod
    def access(cls) -> None:
        if cls.failures and cls.failures.pop(0):
            raise ConnectionResetError("gone")

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if "r" not in mode:
            return super()._open(path, mode)
        FlakyFileSystem.access()
        FlakyFileSystem.opened += 1
        return FlakyFile(MemoryFileSystem().cat_file(path))  # not _open: how often that asks differs by version

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        FlakyFileSystem.access()
        return bytes(super().cat_file(path, start, end, **kwargs))

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        FlakyFileSystem.access()
        return dict(super().info(path, **kwargs))


class FlakyFile(MemoryFile):
    def __init__(self, data: bytes) -> None:
        super().__init__(data=data)

    def read(self, size: int = -1) -> bytes:
        FlakyFileSystem.access()
        return bytes(super().read(size))

    def seek(self, *args: Any) -> int:
        if args[0] and not FlakyFileSystem.seekable:
            raise ValueError("Cannot seek streaming HTTP file")
        return int(super().seek(*args))


@contextmanager
def flaky_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder in a store that fails as `FlakyFileSystem.failures` says; waits between attempts are short."""
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    monkeypatch.setattr(streams, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(FlakyFileSystem, "opened", 0)
    FlakyFileSystem.failures = []
    try:
        yield "flaky://flaky"
    finally:
        FlakyFileSystem.failures = []
        MemoryFileSystem.store.clear()


def stop_workers(data: DataInfo) -> None:
    """End the worker processes of a loader; garbage collection may find their queues first and waits 5 s for each."""
    for stage in data.dataloader.pipeline:
        if getattr(stage, "_iterator", None) is not None:
            stage._iterator._shutdown_workers()
            stage._iterator = None
