"""Show `image` shards to CLIP_benchmark: the same tars under the names that its webdataset reader expects."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress

from . import manifest
from .records import ShardError
from .storage import store


def link_for_clip_benchmark(folder: str, out: str) -> str:
    """Lay out OUT/SPLIT/0.tar, nshards.txt and dataset_type.txt; shards are hard-linked where possible, else copied.

    Returns:
        The `--dataset` argument under which CLIP_benchmark finds it.
    Raises:
        ShardError: the layout is `pair`, whose captions CLIP_benchmark would take for images of their own; samples have
            several dates; OUT and the shards lie in one another; or a file of somebody else stands where a shard would
            come.
    """
    content = manifest.read(folder)
    if content["layout"] != "image":
        raise ShardError(f"{folder}: layout {content['layout']}; CLIP_benchmark wants layout image: reshard it first.")
    if "dates" in content:
        raise ShardError(f"{folder}: samples of {content['dates']} dates; CLIP_benchmark knows one image a sample.")
    if store.overlap(folder, out):
        raise ShardError(
            f"{out}: is the folder of the shards, lies in it or holds it; choose a folder apart from {folder}."
        )
    rows = {split: [row for row in content["shards"] if row["split"] == split] for split in content["splits"]}
    for split, shards in rows.items():
        for index, row in enumerate(shards):
            _require_ours(store.join(out, f"{split}/{index}.tar"), row["sha256"], folder)
    for split, shards in rows.items():
        store.make_folder(store.join(out, split))
        for index, row in enumerate(shards):
            _link(store.join(folder, row["file"]), store.join(out, f"{split}/{index}.tar"))
        store.write_bytes(store.join(out, f"{split}/nshards.txt"), str(len(shards)).encode())
    store.write_bytes(store.join(out, "dataset_type.txt"), b"retrieval")
    return f"wds/{store.base_name(out)}"


def _require_ours(target: str, sha256: str, folder: str) -> None:
    """Raise ShardError if `target` exists and is not the shard that would replace it."""
    if not store.exists(target):
        return
    digest = hashlib.sha256()
    with store.open_read(target) as file:
        while block := file.read(1 << 22):
            digest.update(block)
    if digest.hexdigest() != sha256:
        raise ShardError(
            f"{target}: is there already and is not the shard of {folder}; move it, or choose another folder."
        )


def _link(source: str, target: str) -> None:
    store.remove(target)
    if store.is_local(source) and store.is_local(target):
        with suppress(OSError):  # another device, or a file system without links
            os.link(store.local_path(source), store.local_path(target))
            return
    with store.open_read(source) as data, store.atomic_write(target) as file:
        while block := data.read(1 << 22):
            file.write(block)
