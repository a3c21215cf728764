"""Show `image` shards to CLIP_benchmark: the same tars under the names that its webdataset reader expects."""

from __future__ import annotations

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
        ShardError: the layout is `pair`, whose captions CLIP_benchmark would take for images of their own.
    """
    content = manifest.read(folder)
    if content["layout"] != "image":
        raise ShardError(f"{folder}: layout {content['layout']}; CLIP_benchmark wants layout image: reshard it first.")
    for split in content["splits"]:
        store.make_folder(store.join(out, split))
        files = [row["file"] for row in content["shards"] if row["split"] == split]
        for index, file in enumerate(files):
            _link(store.join(folder, file), store.join(out, f"{split}/{index}.tar"))
        store.write_bytes(store.join(out, f"{split}/nshards.txt"), str(len(files)).encode())
    store.write_bytes(store.join(out, "dataset_type.txt"), b"retrieval")
    return f"wds/{store.base_name(out)}"


def _link(source: str, target: str) -> None:
    store.remove(target)
    if store.is_local(source) and store.is_local(target):
        with suppress(OSError):  # another device, or a file system without links
            os.link(store.local_path(source), store.local_path(target))
            return
    with store.open_read(source) as data, store.atomic_write(target) as file:
        while block := data.read(1 << 22):
            file.write(block)
