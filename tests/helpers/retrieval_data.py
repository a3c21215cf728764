"""Tiny captioned scenes, and models that are perfect or know nothing, for the tests of evaluation, index and search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from msa_openclip.shards.building.build import build
from msa_openclip.shards.options import BuildOptions

WORDS = ("harbor", "forest", "runway", "river", "beach", "stadium", "farmland")
LENGTH = 6
NOWHERE = 216  # the number of texts that name no scene


def scene(index: int, size_px: int = 24) -> Image.Image:
    """A picture of one colour that tells its index (up to 216), with a little of everything on it."""
    colour = (40 * (index % 6) + 20, 40 * (index // 6 % 6) + 20, 40 * (index // 36 % 6) + 20)
    return Image.fromarray(np.full((size_px, size_px, 3), colour, dtype=np.uint8))


def write_captioned_scenes(folder: Path, count: int = 7, captions: int = 5, split: str = "test") -> Path:
    """`folder`/images/*.png and a Karpathy JSON, its path; scene 0 has one caption twice, 0 and 1 share one."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for index in range(count):
        scene(index).save(folder / "images" / f"{WORDS[index % 3]}_{index}.png")
        said = [f"{WORDS[(index + n) % 7]} number {index} seen {n} times" for n in range(captions)]
        if index == 0:
            said[1] = said[0]
        if index <= 1:
            said[2] = "a place that two scenes share"
        sentences = [{"raw": text} for text in said]
        rows.append({"filename": f"{WORDS[index % 3]}_{index}.png", "split": split, "sentences": sentences})
    path = folder / "captions.json"
    path.write_text(json.dumps({"images": rows, "dataset": "scenes"}))
    return path


def write_shards(folder: Path, layout: str = "image", count: int = 7, shards: int = 2, split: str = "test") -> str:
    """Shards of the captioned scenes; returns their pattern."""
    captions = write_captioned_scenes(folder / "source", count=count, split=split)
    options = BuildOptions(layout=layout, shards=shards)
    summary = build(str(captions), str(folder / layout), images=str(captions.parent / "images"), options=options)
    return f"{folder / layout}/{summary.splits[split]['pattern']}"


def square(west: float, south: float, side: float = 1.0) -> dict[str, Any]:
    """GeoJSON of a square in degrees."""
    ring = [[west, south], [west + side, south], [west + side, south + side], [west, south + side], [west, south]]
    return {"type": "Polygon", "coordinates": [ring]}


class Tokenizer:
    """Captions -> token ids: the scene's number first, then a number per word."""

    def __call__(self, texts: list[str]) -> Tensor:
        rows = []
        for text in texts:
            words = text.split()
            number = int(words[words.index("number") + 1]) if "number" in words else NOWHERE
            rows.append([number, *(sum(map(ord, word)) % 50 + 1 for word in words)][:LENGTH])
        return torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows])


def preprocess(image: Image.Image) -> Tensor:
    """To (3, h, w) in 0 to 1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


class Oracle(nn.Module):
    """Knows every scene: features are one-hot of the scene's number.  `constant`: knows none."""

    def __init__(self, *, constant: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.constant = constant

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        digits = ((image.mean(dim=(2, 3)) * 255 - 20) / 40).round().long()
        return self._features(digits @ torch.tensor([1, 6, 36]))

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        return self._features(text[:, 0])

    def _features(self, number: Tensor) -> Tensor:
        if self.constant:
            return torch.linspace(-1.0, 1.3, 217).expand(len(number), 217)
        return nn.functional.one_hot(number, 217).float()


def randomise(model: Any, seed: int = 0) -> Any:
    """Give every parameter of a model weight, also those that start at zero, so that all of it counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()
