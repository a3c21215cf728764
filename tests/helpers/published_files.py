"""Small caption sets under the names and in the formats in which RSITMD, RSICD, UCM, Sydney and NWPU are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = ("airport", "bridge", "farmland", "harbor")
CAPTIONS = 5
COUNTS = {"train": 24, "val": 6, "test": 7}


def write(name: str, folder: Path) -> Path:
    """The files of the set `name` in `folder`, which is returned; like the real ones sorted by class."""
    folder.mkdir(parents=True)
    rows = [_row(number, split) for number, split in enumerate(split for split, n in COUNTS.items() for _ in range(n))]
    rows.sort(key=lambda row: row["class"])
    {"rsitmd": _rsitmd, "rsicd": _rsicd, "ucm": _ucm, "sydney": _sydney, "nwpu": _nwpu}[name](folder, rows)
    return folder


def _row(number: int, split: str) -> dict[str, Any]:
    label = CLASSES[number % len(CLASSES)]
    captions = [f"{label} number {number} with {index} planes ." for index in range(CAPTIONS)]
    return {"number": number, "split": split, "class": label, "captions": captions}


def _rsitmd(folder: Path, rows: list[dict[str, Any]]) -> None:
    """TIFFs, no val split, and one training image without words, as in copies from before October 2021."""
    for row in rows:
        row["split"] = "train" if row["split"] == "val" else row["split"]
    next(row for row in rows if row["split"] == "train")["captions"] = [" "] * CAPTIONS
    _karpathy(folder, "dataset_RSITMD.json", "images", rows, lambda row: f"{row['class']}_{row['number']}.tif")


def _rsicd(folder: Path, rows: list[dict[str, Any]]) -> None:
    _karpathy(folder, "dataset_rsicd.json", "RSICD_images", rows, lambda row: f"{row['class']}_{row['number']}.jpg")


def _ucm(folder: Path, rows: list[dict[str, Any]]) -> None:
    """The captions name .jpg, the files are .tif, and some are not square."""
    _karpathy(folder, "dataset.json", "imgs", rows, lambda row: f"{row['number'] + 1}.tif")
    path = folder / "dataset.json"
    path.write_text(path.read_text().replace(".tif", ".jpg"))
    _picture(0, (34, 32)).save(folder / "imgs" / "1.tif")


def _sydney(folder: Path, rows: list[dict[str, Any]]) -> None:
    _karpathy(folder, "dataset.json", "imgs", rows, lambda row: f"{row['number'] + 1}.tif")


def _nwpu(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Rows by class under raw, raw_1 .. raw_4; images in a folder for each class."""
    content: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        name = f"{row['class']}_{row['number']:03}.jpg"
        texts = {"raw" if not index else f"raw_{index}": text for index, text in enumerate(row["captions"])}
        content.setdefault(row["class"], []).append({"filename": name, "split": row["split"], **texts})
        path = folder / "NWPU-RESISC45" / row["class"] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _picture(row["number"]).save(path)
    (folder / "dataset_nwpu.json").write_text(json.dumps(content))


def _karpathy(folder: Path, captions: str, images: str, rows: list[dict[str, Any]], name: Any) -> None:
    (folder / images).mkdir()
    content = []
    for row in rows:
        _picture(row["number"]).save(folder / images / name(row))
        sentences = [{"raw": text, "tokens": text.split()} for text in row["captions"]]
        content.append({"filename": name(row), "imgid": row["number"], "split": row["split"], "sentences": sentences})
    (folder / captions).write_text(json.dumps({"images": content, "dataset": folder.name}))


def _picture(number: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)
