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
            several dates; OUT and the shards lie in one another; a file of somebody else stands where a shard would
            come; or a shard is not what its manifest says.  Nothing has been written then.
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
    jobs = [
        (row, store.join(out, f"{split}/{index}.tar"))
        for split, shards in rows.items()
        for index, row in enumerate(shards)
    ]
    wanted = [(row, target) for row, target in jobs if not _is_there(target, row["sha256"], folder)]
    for row, _ in wanted:
        _require_whole(store.join(folder, row["file"]), row["sha256"])
    for split, shards in rows.items():
        store.make_folder(store.join(out, split))
        store.write_bytes(store.join(out, f"{split}/nshards.txt"), str(len(shards)).encode())
    for row, target in wanted:
        _link(store.join(folder, row["file"]), target)
    store.write_bytes(store.join(out, "dataset_type.txt"), b"retrieval")
    return f"wds/{store.base_name(out)}"


def _is_there(target: str, sha256: str, folder: str) -> bool:
    """True if `target` is the shard that would come there; a whole copy stays, whatever has become of the shard since.

    Raises:
        ShardError: it is something else.
    """
    if not store.exists(target):
        return False
    if _sha256(target) != sha256:
        raise ShardError(
            f"{target}: is there already and is not the shard of {folder}; move it, or choose another folder."
        )
    return True


def _require_whole(source: str, sha256: str) -> None:
    if _sha256(source) != sha256:
        raise ShardError(f"{source}: is not what the manifest says; `shards verify` finds the place. Build it again.")


def _sha256(url: str) -> str:
    digest = hashlib.sha256()
    with store.open_read(url) as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _link(source: str, target: str) -> None:
    if store.is_local(source) and store.is_local(target):
        with suppress(OSError):  # another device, or a file system without links
            os.link(store.local_path(source), store.local_path(target))
            return
    with store.open_read(source) as data, store.atomic_write(target) as file:
        while block := data.read(1 << 22):
            file.write(block)
