"""What lies beside the shards: manifest.json, sizes.json for open_clip, and rejected.jsonl."""

from __future__ import annotations

import json
import platform
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from typing import Any

import numpy
import PIL

from .building.writer import ShardResult
from .options import BuildOptions
from .records import SPLITS, Rejection, ShardError
from .storage import json_text, store
from .storage.tars import SUM_BYTES

FORMAT = 1
STATE = ".build"
"""Folder inside, for as long as the build is unfinished."""
FILES = ("manifest.json", "sizes.json", "rejected.jsonl")
REPORTS = ("report.json", "report.html")
"""What `build --report` writes, too."""


def fingerprint(options: BuildOptions, plan_digest: str) -> str:
    """Names a build: equal if and only if input and options are, so that only then a build is resumed."""
    return sha256(json.dumps([FORMAT, _byte_options(options), plan_digest], sort_keys=True).encode()).hexdigest()


def make(
    options: BuildOptions, mark: str, results: Iterable[ShardResult], rejections: list[Rejection], dates: int = 1
) -> dict[str, Any]:
    """The manifest of `results` in their order; nothing in it varies between two equal builds.

    It says how many `dates` a sample has if these are several.
    """
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
        **({"dates": dates} if dates > 1 else {}),
        "options": options.to_dict(),
        "versions": versions,
        "splits": splits,
        "rejected": count_reasons(rejections),
        "shards": shards,
    }


class ForeignManifest(ShardError):
    """A manifest.json of another program."""


def read(folder: str) -> dict[str, Any]:
    """The manifest of a folder of shards.

    Raises:
        ShardError: there is none, or it is damaged.
        ForeignManifest: it is no manifest of ours.
    """
    content = _unchecked(folder)
    try:
        _check(content)
    except _Damage as damage:
        url = store.join(folder, "manifest.json")
        raise ShardError(f"{url}: damaged: {damage}. Copy it again, or build again with --overwrite.") from damage
    return content


def listed(folder: str) -> set[str]:
    """Names of the shards of a finished build.

    Where the manifest's own list is damaged, what sizes.json lists under the name of the build counts, too: sizes.json
    is open_clip's, and may list shards of others.

    Raises:
        ShardError: there is no manifest, or it is no JSON.
        ForeignManifest: it is no manifest of ours.
    """
    content = _unchecked(folder)
    rows, options = content.get("shards"), content.get("options")
    files = [row.get("file") if isinstance(row, dict) else None for row in rows] if isinstance(rows, list) else [None]
    names = {file for file in files if isinstance(file, str) and _FILE.fullmatch(file)}
    prefix = options.get("name") if isinstance(options, dict) else None
    if len(names) < len(files) and isinstance(prefix, str):
        with suppress(ShardError, OSError):
            sizes = json_text.parse(store.read_bytes(store.join(folder, "sizes.json")), "sizes.json")
            names |= {name for name in sizes if is_shard_of(prefix, name)} if isinstance(sizes, dict) else set()
    return names


def is_shard(name: str) -> bool:
    """True for the name of a shard of some build."""
    return re.fullmatch(rf"(.+-)?({'|'.join(SPLITS)})-\d{{6}}\.tar", name) is not None


def is_shard_of(prefix: str, name: str) -> bool:
    """True for the name of a shard of a build of the name `prefix`, which may be empty."""
    before = f"{prefix}-" if prefix else ""
    return (
        name.startswith(before) and re.fullmatch(rf"({'|'.join(SPLITS)})-\d{{6}}\.tar", name[len(before) :]) is not None
    )


def _unchecked(folder: str) -> dict[str, Any]:
    """A manifest of ours, whose parts may be damaged."""
    url = store.join(folder, "manifest.json")
    try:
        content = json_text.parse(store.read_bytes(url), url)
    except FileNotFoundError as error:
        raise ShardError(f"{url}: no such file; the folder holds no finished build.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ForeignManifest(f"{url}: not a manifest of format {FORMAT}.")
    return content


class _Damage(ValueError):
    """Where a manifest is not what we write."""


_SHARD = {
    "file": str, "split": str, "samples": int, "images": int, "captions": int, "size_bytes": int, "sha256": str,
    "sums": str,
}  # fmt: skip
_SPLIT = {"shards": int, "pattern": str, "samples": int, "images": int, "captions": int, "size_bytes": int}


def _check(content: dict[str, Any]) -> None:
    """What readers of a manifest rely on: its parts are there, of their types, and name nothing outside the folder."""
    parts = {"fingerprint": str, "layout": str, "options": dict, "splits": dict, "rejected": dict, "shards": list}
    _check_fields({"dates": 1, **content}, parts | {"dates": int}, "")
    _check_fields(content["rejected"], dict.fromkeys(content["rejected"], int), "rejected.")
    for split, row in content["splits"].items():
        if split not in SPLITS:
            raise _Damage(f"splits: {split!r} is not one of {', '.join(SPLITS)}")
        _check_fields(row, _SPLIT, f"splits.{split}.")
    names = set()
    for index, row in enumerate(content["shards"]):
        _check_fields(row, _SHARD, f"shards[{index}].")
        file = row["file"]
        if not _FILE.fullmatch(file) or file in names:
            raise _Damage(
                f"shards[{index}].file: {file!r} is {'there twice' if file in names else 'no name of a shard'}"
            )
        names.add(file)
        if row["split"] not in content["splits"]:
            raise _Damage(f"shards[{index}].split: {row['split']!r} is not among the splits")
        blocks = -(-row["size_bytes"] // SUM_BYTES)
        if not re.fullmatch(r"[0-9a-f]{8}( [0-9a-f]{8})*", row["sums"]) or len(row["sums"].split()) != blocks:
            raise _Damage(f"shards[{index}].sums: not a checksum for each of {blocks} MiB")


_FILE = re.compile(r"[^/\\\0]+-\d{6}\.tar")


def _check_fields(row: Any, fields: Mapping[str, type], where: str) -> None:
    if not isinstance(row, dict):
        raise _Damage(f"{where.rstrip('.')}: {type(row).__name__} where an object is expected")
    for name, kind in fields.items():
        value = row.get(name)
        if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and value < 0):
            found = f"{value!r:.40}" if name in row else "missing"
            raise _Damage(f"{where}{name}: {found} where {_EXPECTED[kind]} is expected")


_EXPECTED = {int: "a number", str: "text", list: "a list", dict: "an object"}


def write(folder: str, manifest: dict[str, Any], rejections: list[Rejection]) -> None:
    """Put down all files of a finished build, the manifest last: where it stands, everything does."""
    write_rejections(folder, rejections)
    sizes = {row["file"]: row["samples"] for row in manifest["shards"]}
    store.write_bytes(store.join(folder, "sizes.json"), json.dumps(sizes, indent=1).encode())
    store.write_text(store.join(folder, "manifest.json"), json.dumps(manifest, indent=1, ensure_ascii=False))


def write_rejections(folder: str, rejections: list[Rejection]) -> None:
    """rejected.jsonl, a row for each problem."""
    lines = (json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rejections)
    store.write_text(store.join(folder, "rejected.jsonl"), "".join(lines))


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
