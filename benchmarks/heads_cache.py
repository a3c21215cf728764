"""Caches what frozen towers make of RSICD and UCM-Captions, for heads_study.py.

    python benchmarks/heads_cache.py CACHE --rsicd RSICD --ucm UCM --image-weights LITE0.pth --text-weights MINILM

RSICD and UCM are folders with dataset_NAME.json (Karpathy's format) and images/; LITE0.pth is a state dict of
timm's tf_efficientnet_lite0, MINILM a Hugging Face folder of all-MiniLM-L6-v2.

CACHE gets index.json (captions; set, split, file and captions of each of the n images), pool.npy (views, n, 2272)
float16, whose columns are the maxima of stages 1 to 4, their averages, and the averaged map behind the head's
convolution, and text.npz: `last` (captions, 32, 384) float16, `mask` of its tokens, `mean` over them.  View 0 is the
plain image, the others are drawn as `view` says.  About an hour on one core, 0.8 GB.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

STAGES, HEAD, TEXT = (24, 40, 112, 320), 1280, 384
"""Channels of the stages, of the map behind the head's convolution, and of MiniLM's hidden states."""
VIEWS, SIDE, SIZE, TOKENS = 6, 150, 160, 32
"""Views of an image; pixels that images are reduced to (what our copy of RSICD has) and that the tower sees."""
MEAN, STD = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def read_index(folders: dict[str, Path]) -> dict[str, Any]:
    """The distinct captions of all sets, sorted, and of each image its set, split, file and captions by number."""
    images = [
        (name, item["split"], item["filename"], [sentence["raw"] for sentence in item["sentences"]])
        for name, folder in folders.items()
        for item in json.loads((folder / f"dataset_{name}.json").read_text())["images"]
    ]
    captions = sorted({caption for *_, own in images for caption in own})
    number = {caption: i for i, caption in enumerate(captions)}
    return {"captions": captions, "images": [(*about, [number[c] for c in own]) for *about, own in images]}


def view(image: Image.Image, number: int, rng: np.random.Generator) -> Image.Image:
    """View 0: the plain image; else a crop of 50 to 100 % of its area, flipped and turned by quarters at random."""
    image = image if image.size == (SIDE, SIDE) else image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    if number == 0:
        return image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    area, ratio = rng.uniform(0.5, 1.0), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    width, height = min(SIDE, SIDE * np.sqrt(area * ratio)), min(SIDE, SIDE * np.sqrt(area / ratio))
    left, top = rng.uniform(0, SIDE - width), rng.uniform(0, SIDE - height)
    image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    turns = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
    turn = turns[rng.integers(4)]
    return image if turn is None else image.transpose(turn)


def image_tower(weights: Path) -> Any:
    """EfficientNet-Lite0.  Weights are taken in order: the names of published files differ, order and shapes do not."""
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    values = torch.load(weights, weights_only=True).values()
    model.load_state_dict(dict(zip(model.state_dict(), values, strict=True)))
    return model.to(memory_format=torch.channels_last)


def pooled(model: Any, pixels: Tensor) -> Tensor:
    """(I, 3, h, w) normalised pixels -> (I, 2272) the pooled vectors, as the module's text orders them."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        last, maps = model.forward_intermediates(pixels, indices=[1, 2, 3, 4])
    maps = [stage.float() for stage in maps]
    vectors = [*(m.amax((2, 3)) for m in maps), *(m.mean((2, 3)) for m in maps), last.float().mean((2, 3))]
    return torch.cat(vectors, dim=1)


def cache_images(out: Path, index: dict[str, Any], folders: dict[str, Path], weights: Path) -> None:
    """Write pool.npy, batch after batch."""
    model, images = image_tower(weights), index["images"]
    shape = (VIEWS, len(images), 2 * sum(STAGES) + HEAD)
    array = np.lib.format.open_memmap(out / "pool.npy", mode="w+", dtype=np.float16, shape=shape)
    for rows in batches(np.arange(len(images)), 32):
        files = [folders[images[row][0]] / "images" / images[row][2] for row in rows]
        opened = [Image.open(file).convert("RGB") for file in files]
        for number in range(VIEWS):
            drawn = [view(i, number, np.random.default_rng([r, number])) for r, i in zip(rows, opened, strict=True)]
            pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in drawn]) / 255
            array[number, rows] = pooled(model, ((pixels - MEAN) / STD).contiguous(memory_format=torch.channels_last))
        print(f"{rows[-1] + 1} of {len(images)} images", flush=True)


def cache_texts(out: Path, captions: list[str], weights: Path) -> None:
    """Write text.npz; captions of like length share a batch."""
    tokenizer, model = AutoTokenizer.from_pretrained(weights), AutoModel.from_pretrained(weights).eval()
    last = np.zeros((len(captions), TOKENS, TEXT), np.float16)
    mask = np.zeros((len(captions), TOKENS), bool)
    mean = np.zeros((len(captions), TEXT), np.float32)
    for rows in batches(np.argsort([len(caption) for caption in captions]), 128):
        batch = tokenizer(
            [captions[row] for row in rows], padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
        )
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            hidden = model(**batch).last_hidden_state.float()
        held = batch["attention_mask"].bool()
        last[rows, : held.shape[1]], mask[rows, : held.shape[1]] = hidden, held
        mean[rows] = (hidden * held[..., None]).sum(1) / held.sum(1, keepdim=True)
    np.savez(out / "text.npz", last=last, mask=mask, mean=mean)


def batches(rows: np.ndarray[Any, Any], size: int) -> Iterator[np.ndarray[Any, Any]]:
    """The rows in their order, `size` at a time."""
    return (rows[start : start + size] for start in range(0, len(rows), size))


def main() -> None:
    """Write the cache."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, metavar="CACHE")
    for name in ("rsicd", "ucm", "image-weights", "text-weights"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    folders = {"rsicd": args.rsicd, "ucm": args.ucm}
    args.cache.mkdir(parents=True, exist_ok=True)
    index = read_index(folders)
    (args.cache / "index.json").write_text(json.dumps(index))
    cache_texts(args.cache, index["captions"], args.text_weights)
    cache_images(args.cache, index, folders, args.image_weights)


if __name__ == "__main__":
    main()
