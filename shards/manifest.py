"""What lies beside the shards: manifest.json, sizes.json for open_clip, and rejected.jsonl."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from hashlib import sha256
from typing import Any

import numpy
import PIL

from .building.writer import ShardResult
from .options import BuildOptions
from .records import SPLITS, Rejection, ShardError
from .storage import store

FORMAT = 1
FILES = ("manifest.json", "sizes.json", "rejected.jsonl")


def fingerprint(options: BuildOptions, plan_digest: str) -> str:
    """Names a build: equal if and only if input and options are, so that only then a build is resumed."""
    return sha256(json.dumps([FORMAT, _byte_options(options), plan_digest], sort_keys=True).encode()).hexdigest()


def make(
    options: BuildOptions, mark: str, results: Iterable[ShardResult], rejections: list[Rejection]
) -> dict[str, Any]:
    """The manifest of `results` in their order; nothing in it varies between two equal builds."""
    shards = [result.entry() for result in results]
    splits = {}
    for split in SPLITS:
        rows = [row for row in shards if row["split"] == split]
        if rows:
            totals = {name: sum(row[name] for row in rows) for name in ("samples", "images", "captions", "size_bytes")}
            splits[split] = {"shards": len(rows), "pattern": brace_pattern([row["file"] for row in rows])} | totals
    versions = {"python": platform.python_version(), "pillow": PIL.__version__, "numpy": numpy.__version__}
    return {
        "format": FORMAT,
        "fingerprint": mark,
        "seed": options.seed,
        "layout": options.layout,
        "options": options.to_dict(),
        "versions": versions,
        "splits": splits,
        "rejected": count_reasons(rejections),
        "shards": shards,
    }


def read(folder: str) -> dict[str, Any]:
    """The manifest of a folder of shards.

    Raises:
        ShardError: there is none, or it is no manifest of ours.
    """
    url = store.join(folder, "manifest.json")
    try:
        content = json.loads(store.read_bytes(url))
    except FileNotFoundError as error:
        raise ShardError(f"{url}: no such file; the folder holds no finished build.") from error
    except ValueError as error:
        raise ShardError(f"{url}: not JSON ({error}).") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ShardError(f"{url}: not a manifest of format {FORMAT}.")
    return content


def write(folder: str, manifest: dict[str, Any], rejections: list[Rejection]) -> None:
    """Put down all files of a finished build, the manifest last: where it stands, everything does."""
    write_rejections(folder, rejections)
    sizes = {row["file"]: row["samples"] for row in manifest["shards"]}
    store.write_bytes(store.join(folder, "sizes.json"), json.dumps(sizes, indent=1).encode())
    store.write_bytes(store.join(folder, "manifest.json"), json.dumps(manifest, indent=1, ensure_ascii=False).encode())


def write_rejections(folder: str, rejections: list[Rejection]) -> None:
    """rejected.jsonl, a row for each problem."""
    lines = (json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rejections)
    store.write_bytes(store.join(folder, "rejected.jsonl"), "".join(lines).encode())


def count_reasons(rejections: Iterable[Rejection]) -> dict[str, int]:
    """How often each reason occurs, by name."""
    return dict(sorted(Counter(row.reason for row in rejections).items()))


def brace_pattern(files: list[str]) -> str:
    """The shards of a split as open_clip takes them: train-{000000..000007}.tar."""
    first, last = (file.removesuffix(".tar")[-6:] for file in (files[0], files[-1]))
    return files[0] if first == last else f"{files[0].removesuffix(f'{first}.tar')}{{{first}..{last}}}.tar"


def _byte_options(options: BuildOptions) -> dict[str, Any]:
    versions = {"pillow": PIL.__version__}  # another encoder, other bytes
    return options.to_dict() | {"versions": versions}
