"""Tiny generated sources for the shard tests: distinct images, captions in the circulating formats, real data."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

REAL_DATA = Path(os.environ.get("MSA_TEST_DATA", Path(__file__).parents[2] / "../shared/data")).resolve()


def real_data(part: str) -> Path:
    """A folder of the real data sets, or a skip that says how to get it in."""
    folder = REAL_DATA / part
    if not folder.is_dir():
        pytest.skip(f"real data {folder} is absent; point MSA_TEST_DATA at the folder that holds {part}/")
    return folder


def picture(number: int, size: tuple[int, int] = (24, 24), mode: str = "RGB") -> Image.Image:
    """A picture that no other number has."""
    noise = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def picture_bytes(number: int, format: str = "JPEG", **save: Any) -> bytes:
    """`picture` encoded."""
    out = io.BytesIO()
    picture(number).save(out, format, **save)
    return out.getvalue()


def karpathy(folder: Path, counts: dict[str, int], *, captions: int = 5, suffix: str = "jpg") -> Path:
    """A Karpathy JSON with its images, sorted by class as real ones are; returns the JSON."""
    (folder / "images").mkdir(parents=True)
    rows, number = [], 0
    for split, count in counts.items():
        for _ in range(count):
            name = f"{number}.{suffix}"
            picture(number).save(folder / "images" / name)
            sentences = [{"raw": f"picture {number} says {index} .", "tokens": ["wrong"]} for index in range(captions)]
            rows.append({"filename": name, "split": split, "sentences": sentences, "imgid": number})
            number += 1
    path = folder / "captions.json"
    path.write_text(json.dumps({"images": rows, "dataset": "tiny"}))
    return path


def tar_members(path: Path | str) -> list[tuple[str, bytes]]:
    """All members of a tar, by the standard library."""
    with tarfile.open(path) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]


def shard_bytes(folder: Path) -> dict[str, bytes]:
    """The shards of a folder by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}
