"""Lists of images become whole files of vectors, each once, whoever is killed meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from helpers.retrieval_data import randomise, scene

from msa_openclip.data.captioned import CaptionedImage
from msa_openclip.data.readers import read_folder
from msa_openclip.data.repeats import without_repeats
from msa_openclip.embedding.embedder import Embedder, EmbedError
from msa_openclip.embedding.partitions import partitions, write_vectors
from msa_openclip.search.schema import product_of, to_images

COUNT, SIZE = 7, 3


@pytest.fixture
def spec(tiny_configs: Path, tmp_path: Path) -> str:
    path = tmp_path / "msa.pt"
    torch.save(randomise(open_clip.create_model("MSA-tiny-ViT"), seed=3).state_dict(), path)
    return f"MSA-tiny-ViT={path}"


@pytest.fixture
def images(tmp_path: Path) -> list[CaptionedImage]:
    (tmp_path / "tiles").mkdir()
    for number in range(COUNT):
        scene(number).save(tmp_path / "tiles" / f"{number}.png")
    return read_folder(str(tmp_path / "tiles"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_all(images: list[CaptionedImage], spec: str, folder: Path) -> list[Any]:
    embedder = Embedder(spec, precision="fp32")
    return [write_vectors(part, embedder, str(folder)) for part in partitions(images, SIZE)]


def test_a_partition_is_whole_and_written_once(images: list[CaptionedImage], spec: str, tmp_path: Path) -> None:
    written = write_all(images, spec, tmp_path / "parts")
    assert [(part.rows, part.new) for part in written] == [(3, True), (3, True), (1, True)]
    before = contents(tmp_path / "parts")
    assert [name[:7] for name in sorted(before)] == ["000000-", "000001-", "000002-"]
    assert [part.new for part in write_all(images, spec, tmp_path / "parts")] == [False] * 3
    assert contents(tmp_path / "parts") == before
    tables = [pq.read_table(path) for path in sorted((tmp_path / "parts").iterdir())]
    found = [image for table in tables for image in to_images(table)]
    assert [image.image_id for image in found] == [image.image_id for image in images]
    assert all(image.content for image in found)
    assert product_of(tables[0].schema, "x") == Embedder(spec, precision="fp32").product


def test_what_is_missing_or_cut_short_is_written_again(
    images: list[CaptionedImage], spec: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written = write_all(images, spec, tmp_path / "parts")
    before = contents(tmp_path / "parts")
    first, second = Path(written[0].file), Path(written[1].file)
    first.unlink()
    second.write_bytes(second.read_bytes()[:500])
    assert [part.new for part in write_all(images, spec, tmp_path / "parts")] == [True, True, False]
    assert contents(tmp_path / "parts") == before
    assert f"{second}: not a whole file" in caplog.text


def test_two_workers_of_one_partition_leave_one_whole_file(
    images: list[CaptionedImage], spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second removes, as a left-over, what the first is about to give its name; both go on."""
    from msa_openclip.shards.storage import store

    embedder, (part, *_) = Embedder(spec, precision="fp32"), partitions(images, SIZE)
    renamed, second = store.rename, []

    def rename(path: str, final: str) -> None:
        if not second:
            second.append(None)
            second[0] = write_vectors(part, embedder, str(tmp_path / "parts"))
        renamed(path, final)

    monkeypatch.setattr(store, "rename", rename)
    first = write_vectors(part, embedder, str(tmp_path / "parts"))
    assert first == second[0]
    assert [path.name for path in (tmp_path / "parts").iterdir()] == [Path(first.file).name]
    assert pq.read_table(first.file).num_rows == first.rows == SIZE


def test_names_stand_for_rows_content_and_model(images: list[CaptionedImage], spec: str, tmp_path: Path) -> None:
    names = [Path(part.file).name for part in write_all(images, spec, tmp_path / "one")]
    scene(99).save(images[4].location.url)
    changed = [Path(part.file).name for part in write_all(images, spec, tmp_path / "two")]
    assert [one == two for one, two in zip(names, changed, strict=True)] == [True, False, True]
    other = [Path(part.file).name for part in write_all(images, "MSA-tiny-ViT=untrained", tmp_path / "three")]
    assert not set(other) & set(changed)


def test_parts_of_another_list_are_refused(images: list[CaptionedImage], spec: str, tmp_path: Path) -> None:
    write_all(images, spec, tmp_path / "parts")
    for other in (images[1:], images[:SIZE]):  # other parts of the same number, and a shorter list
        with pytest.raises(EmbedError, match=r"parquet: part \d of another list, model or size of partitions"):
            write_all(other, spec, tmp_path / "parts")


def test_workers_with_different_lists_are_told(images: list[CaptionedImage], spec: str, tmp_path: Path) -> None:
    """One of them lacks an image, so that parts of other numbers lose it or hold another twice."""
    embedder = Embedder(spec, precision="fp32")
    write_vectors(partitions([*images[:1], *images[2:]], SIZE)[0], embedder, str(tmp_path / "parts"))
    with pytest.raises(EmbedError, match=r"000000-.*\.parquet: part 0 of another list, model or size of partitions"):
        write_vectors(partitions(images, SIZE)[1], embedder, str(tmp_path / "parts"))
    (first,) = (tmp_path / "parts").iterdir()
    assert first.name.startswith("000000-")


def test_images_that_cannot_be_read_are_named_and_counted_every_time(
    images: list[CaptionedImage], spec: str, tmp_path: Path
) -> None:
    for number in (0, 6):
        Path(images[number].location.url).write_bytes(b"no image")
    for _ in range(2):
        written = write_all(images, spec, tmp_path / "parts")
        assert [part.rows for part in written] == [2, 3, 0]
        assert [[Path(row.file).name for row in part.left_out] for part in written] == [["0.png"], [], ["6.png"]]
        assert "cannot be read" in written[2].left_out[0].reason
    beside = tmp_path / "parts" / Path(written[0].file).name.replace(".parquet", ".left-out.jsonl")
    assert json.loads(beside.read_text())["id"] == "0.png"


def test_repeated_images_are_named_and_left_out_once(images: list[CaptionedImage]) -> None:
    kept, repeated = without_repeats([*images, images[2], images[2]])
    assert kept == images
    assert repeated == [("2.png", "it occurs twice in the list")] * 2


def test_wrong_sizes_are_refused(images: list[CaptionedImage]) -> None:
    with pytest.raises(EmbedError, match="partition_images: 0 must be at least 1"):
        partitions(images, 0)


def test_a_killed_loop_goes_on_where_it_was(
    images: list[CaptionedImage], spec: str, tmp_path: Path, tiny_configs: Path
) -> None:
    """Killed while it writes its second partition: the first stays, the half of the second goes."""
    code = f"""
import sys, time
import open_clip
open_clip.add_model_config({str(tiny_configs)!r})
from msa_openclip.data.readers import read_folder
from msa_openclip.embedding import partitions
from msa_openclip.embedding.embedder import Embedder
from msa_openclip.search import schema
from msa_openclip.shards.storage import store
def whole(table, product):
    return schema.parquet(table.take(schema.hilbert_order(table)), product)
def half(url, *arguments):
    if any(__import__("pathlib").Path(sys.argv[1]).glob("*.parquet")):
        with store.atomic_write(url) as file:
            file.write(whole(*arguments)[:700])
            file.flush()
            print("half", flush=True)
            time.sleep(60)
    store.write_bytes(url, whole(*arguments))
partitions.write_partition = half
embedder = Embedder({spec!r}, precision="fp32")
for part in partitions.partitions(read_folder({str(tmp_path / "tiles")!r}), {SIZE}):
    partitions.write_vectors(part, embedder, sys.argv[1])
"""
    parts = tmp_path / "parts"
    parts.mkdir()
    process = subprocess.Popen([sys.executable, "-c", code, str(parts)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert sorted(path.suffix for path in parts.iterdir()) == [".parquet", ".tmp"]
    stamp = next(parts.glob("*.parquet")).stat().st_mtime_ns
    time.sleep(0.01)
    assert [part.new for part in write_all(images, spec, parts)] == [False, True, True]
    assert next(iter(sorted(parts.iterdir()))).stat().st_mtime_ns == stamp
    write_all(images, spec, tmp_path / "undisturbed")
    assert contents(parts) == contents(tmp_path / "undisturbed")
