"""The builder's promises on the core path: what is in the shards, in which order, and that open_clip reads it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections import Counter
from pathlib import Path

import fsspec
import pytest
import webdataset
from helpers.host import images_and_texts, traits
from helpers.shards_data import karpathy, picture_bytes, real_data, shard_bytes, tar_members
from hypothesis import example, given, settings
from hypothesis import strategies as st

from msa_openclip.shards import BuildOptions, ImageOptions, ShardError, build
from msa_openclip.shards.building.plan import Plan
from msa_openclip.shards.building.writer import ShardJob, write_shard
from msa_openclip.shards.readers import fields, intake
from msa_openclip.shards.records import Entry, Location, Record, sample_key

COUNTS = {"train": 23, "val": 5, "test": 3}


def test_image_layout_holds_every_image_once_with_all_captions(tmp_path: Path) -> None:
    source = karpathy(tmp_path / "in", COUNTS)
    build(str(source), str(tmp_path / "out"), images=str(source.parent / "images"), options=BuildOptions(shards=2))
    found = {}
    for path in (tmp_path / "out").glob("train-*.tar"):
        members = tar_members(path)
        for (jpg, data), (txt, text), (name, metadata) in zip(members[::3], members[1::3], members[2::3], strict=True):
            key = jpg.removesuffix(".jpg")
            assert (txt, name) == (f"{key}.txt", f"{key}.json")
            row = json.loads(metadata)
            assert data == (source.parent / "images" / row["source"]).read_bytes()
            assert text.decode().split("\n") == row["captions"] == [row[f"caption_{index}"] for index in range(5)]
            assert row["captions"] == [f"picture {key} says {index} ." for index in range(5)]
            assert (row["image_id"], row["split"], row["width"], row["height"]) == (key, "train", 24, 24)
            found[key] = path
    assert set(found) == {str(number) for number in range(23)}


def test_pair_layout_holds_every_caption_once_and_regroups_by_image_id(tmp_path: Path) -> None:
    source = karpathy(tmp_path / "in", COUNTS, captions=3)
    options = BuildOptions(layout="pair", shards=2, name="tiny")
    summary = build(str(source), str(tmp_path / "out"), images=str(source.parent / "images"), options=options)
    groups: dict[str, dict[int, str]] = {}
    keys = []
    for path in sorted((tmp_path / "out").glob("tiny-train-*.tar")):
        for name, data in tar_members(path):
            if name.endswith(".json"):
                row = json.loads(data)
                keys.append(name.removesuffix(".json"))
                groups.setdefault(row["image_id"], {})[row["caption_index"]] = row["captions"][0]
                assert row["caption_count"] == 3
    assert len(keys) == len(set(keys)) == 23 * 3 == summary.splits["train"]["samples"]
    assert not any("." in key for key in keys)
    assert groups == {str(n): {i: f"picture {n} says {i} ." for i in range(3)} for n in range(23)}


def test_order_is_global_and_seeded(tmp_path: Path) -> None:
    source = karpathy(tmp_path / "in", {"train": 60})

    def order(seed: int) -> list[int]:
        out = tmp_path / f"out{seed}"
        build(str(source), str(out), images=str(source.parent / "images"), options=BuildOptions(shards=3, seed=seed))
        return [int(n[:-4]) for p in sorted(out.glob("*.tar")) for n, _ in tar_members(p) if n.endswith(".jpg")]

    first, other = order(0), order(1)
    assert sorted(first) == sorted(other) == list(range(60))
    assert first != other
    for shard in (first[:20], first[20:40], first[40:]):  # the source is sorted, each shard spans it
        assert min(shard) < 20
        assert max(shard) >= 40


def test_shards_are_equal_byte_for_byte_for_any_workers_and_input_order(tmp_path: Path) -> None:
    source = karpathy(tmp_path / "in", COUNTS)
    content = json.loads(source.read_text())
    images = str(source.parent / "images")
    build(str(source), str(tmp_path / "one"), images=images, options=BuildOptions(shards=3))
    content["images"].reverse()
    source.write_text(json.dumps(content))
    build(str(source), str(tmp_path / "two"), images=images, options=BuildOptions(shards=3), workers=2)
    assert shard_bytes(tmp_path / "one") == shard_bytes(tmp_path / "two")
    assert len(shard_bytes(tmp_path / "one")) == 9


def test_manifest_sizes_and_hashes_tell_the_truth(tmp_path: Path) -> None:
    import hashlib

    source = karpathy(tmp_path / "in", COUNTS)
    summary = build(
        str(source),
        str(tmp_path / "out"),
        images=str(source.parent / "images"),
        options=BuildOptions(shards=2, name="tiny"),
    )
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    sizes = json.loads((tmp_path / "out/sizes.json").read_text())
    assert summary.splits["train"]["pattern"] == "tiny-train-{000000..000001}.tar"
    assert {row["file"] for row in manifest["shards"]} == set(sizes) == set(shard_bytes(tmp_path / "out"))
    for row in manifest["shards"]:
        data = (tmp_path / "out" / row["file"]).read_bytes()
        assert (row["size_bytes"], row["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        assert row["samples"] == sizes[row["file"]] == len(tar_members(tmp_path / "out" / row["file"])) / 3
    assert not (tmp_path / "out/.build").exists()


def test_every_problem_is_a_row_and_strict_fails(tmp_path: Path) -> None:
    source = karpathy(tmp_path / "in", {"train": 12})
    images = source.parent / "images"
    content = json.loads(source.read_text())
    rows = content["images"]
    (images / "0.jpg").write_bytes(b"not an image")
    (images / "1.jpg").write_bytes((images / "1.jpg").read_bytes()[:-200])
    (images / "2.jpg").unlink()
    rows[3]["sentences"][1]["raw"] = " \n "
    rows[4]["sentences"] = [{"raw": ""}]
    rows[5]["split"] = "trian"
    rows.append(dict(rows[6], split="train"))
    source.write_text(json.dumps(content))
    summary = build(str(source), str(tmp_path / "out"), images=str(images))
    rejected = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert {(row["file"], row["reason"]) for row in rejected} == {
        ("0.jpg", "unreadable image"),
        ("1.jpg", "unreadable image"),
        ("2.jpg", "missing image"),
        ("3.jpg", "blank caption"),
        ("4.jpg", "blank caption"),
        ("4.jpg", "no captions"),
        ("5.jpg", "unknown split"),
        ("6.jpg", "duplicate key"),
    }
    assert summary.rejected["unreadable image"] == 2
    assert summary.splits["train"]["samples"] == 12 - 5
    assert "unreadable image: 2" in summary.text()
    with pytest.raises(ShardError, match=r"strict: 6 problems, the first: .*jpg"):
        build(str(source), str(tmp_path / "strict"), images=str(images), strict=True)


def test_strict_names_the_unreadable_image(tmp_path: Path) -> None:
    source = karpathy(tmp_path / "in", {"train": 12})
    (tmp_path / "in/images/7.jpg").write_bytes(b"not an image")
    with pytest.raises(ShardError, match=r"7\.jpg: not an image"):
        build(str(source), str(tmp_path / "out"), images=str(tmp_path / "in/images"), strict=True)
    assert not list((tmp_path / "out").glob("*.tar"))


def test_a_build_with_nothing_in_it_fails_and_says_where_it_looked(tmp_path: Path) -> None:
    source = karpathy(tmp_path / "in", {"train": 3})
    with pytest.raises(ShardError, match=r"nothing is left.*missing image: 3.*elsewhere"):
        build(str(source), str(tmp_path / "out"), images=str(tmp_path / "elsewhere"))
    source.write_text('{"images": []}')
    with pytest.raises(ShardError, match="names no images"):
        build(str(source), str(tmp_path / "out"))


def test_few_shards_for_the_readers_are_announced(tmp_path: Path) -> None:
    source = karpathy(tmp_path / "in", {"train": 64})
    images = str(source.parent / "images")
    few = build(str(source), str(tmp_path / "few"), images=images, options=BuildOptions(shards=2, loader_workers=3))
    assert "2 training shards are fewer than 3 loader workers x 1 ranks = 3" in few.advice[0]
    enough = build(str(source), str(tmp_path / "ok"), images=images, options=BuildOptions(loader_workers=3, ranks=2))
    assert enough.splits["train"]["shards"] == 6
    assert not any("fewer" in line for line in enough.advice)


@pytest.mark.parametrize("shard_mb", [1e-320, 0.0, -1.0, float("nan")])
def test_shards_of_no_size_are_refused(shard_mb: float) -> None:
    with pytest.raises(ShardError, match=r"shard_mb: .* must be a number of at least 0.001"):
        BuildOptions(shard_mb=shard_mb)


def test_tif_named_jpg_is_found_and_transcoded_without_loss(tmp_path: Path) -> None:
    folder = real_data("ucm")
    rows = json.loads((folder / "dataset_ucm.json").read_text())["images"]
    have = {path.stem for path in (folder / "tif").glob("*.tif")}
    rows = [row for row in rows if row["filename"].removesuffix(".jpg") in have]
    (tmp_path / "c.json").write_text(json.dumps({"images": rows}))
    build(str(tmp_path / "c.json"), str(tmp_path / "out"), images=str(folder / "tif"), options=BuildOptions(shards=1))
    import io

    import numpy as np
    from PIL import Image

    seen = 0
    for path in (tmp_path / "out").glob("*.tar"):
        for name, data in tar_members(path):
            if name.endswith(".png"):
                original = Image.open(folder / "tif" / name.replace(".png", ".tif"))
                assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(original))
                seen += 1
    assert seen == 16


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # open_clip leaves sizes.json open
@pytest.mark.parametrize("layout", ["pair", "image"])
def test_unmodified_open_clip_reads_every_sample(tmp_path: Path, layout: str, caplog: pytest.LogCaptureFixture) -> None:
    import torch
    from open_clip_train.data import get_wds_dataset
    from torchvision.transforms.functional import pil_to_tensor

    source = karpathy(tmp_path / "in", {"train": 16, "val": 5})
    options = BuildOptions(layout=layout, shards=2)
    summary = build(str(source), str(tmp_path / "out"), images=str(source.parent / "images"), options=options)
    seen: list[str] = []

    def tokenizer(text: str) -> list[torch.Tensor]:
        seen.append(text)
        return [torch.tensor([len(text)])]

    patterns = {split: str(tmp_path / "out" / row["pattern"]) for split, row in summary.splits.items()}
    args = Namespace(
        train_data=patterns["train"],
        val_data=patterns["val"],
        train_num_samples=None,
        batch_size=4,
        val_num_samples=None,
        workers=0,
        world_size=1,
        seed=0,
        train_data_upsampling_factors=None,
    )
    for is_train, split in ((True, "train"), (False, "val")):
        seen.clear()
        with caplog.at_level(logging.WARNING):
            data = get_wds_dataset(args, pil_to_tensor, is_train, tokenizer=tokenizer, **traits())
            images = sum(len(images_and_texts(batch)[0]) for batch in data.dataloader)
        samples = summary.splits[split]["samples"]
        texts = {f"picture {n} says {i} ." for n in (range(16) if is_train else range(16, 21)) for i in range(5)}
        assert images >= samples
        assert {line for text in seen for line in text.split("\n")} == texts
        if is_train:
            assert data.dataloader.num_samples == samples  # sizes.json was used
    assert not caplog.records


def test_nothing_of_torch_is_imported(tmp_path: Path) -> None:
    source = karpathy(tmp_path / "in", {"train": 2})
    arguments = ["build", str(source), str(tmp_path / "out"), "--images", str(source.parent / "images"), "--quiet"]
    code = (
        "import sys; from msa_openclip.shards.command_line import main;"
        f"code = main({arguments} + ['--workers', '1']);"
        "print(code, sorted(name for name in sys.modules if name.split('.')[0] in ('torch', 'open_clip', 'timm')))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "0 []", run.stdout + run.stderr


def test_truncation_is_found_without_decoding_for_every_passing_format() -> None:
    from msa_openclip.shards.imagery.prepare import prepare
    from msa_openclip.shards.records import ImageProblem

    for format in ("JPEG", "PNG", "WEBP"):
        data = picture_bytes(1, format)
        assert prepare(data, ImageOptions()).data == data
        with pytest.raises(ImageProblem, match=r"cut short|cannot be decoded"):
            prepare(data[: len(data) * 2 // 3], ImageOptions())


NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=30)


@settings(max_examples=25, deadline=None)
@example({"0": ["null", "a null"]})
@given(
    st.dictionaries(NAMES, st.lists(st.text(max_size=40), max_size=4), max_size=6).filter(
        lambda sources: len(set(map(sample_key, sources))) == len(sources)
    )
)
def test_any_name_and_caption_arrives_through_webdataset(sources: dict[str, list[str]]) -> None:
    entries = [
        Entry(Location("memory://any/0.jpg"), tuple(captions), image_id=name, split="train")
        for name, captions in sources.items()
    ]
    fsspec.filesystem("memory").pipe_file("/any/0.jpg", picture_bytes(0))
    options = BuildOptions(layout="pair", shards=1)
    with Plan(intake.to_records(entries, "", options.read, 0), options) as plan, tempfile.TemporaryDirectory() as out:
        expected = Counter((name, " ".join(text.split())) for name, texts in sources.items() for text in texts)
        expected = Counter({pair: n for pair, n in expected.items() if pair[1] and pair[1] not in fields.MISSING})
        found: Counter[tuple[str, str]] = Counter()
        for shard in plan.shards:
            write_shard(ShardJob(shard.file, shard.split, out, tuple(plan.samples(shard)), options.image))
            for sample in webdataset.WebDataset(f"{out}/{shard.file}", shardshuffle=False).decode():
                assert sample["json"]["captions"] == [sample["txt"]]
                found[sample["json"]["image_id"], sample["txt"]] += 1
        assert found == expected


def test_names_that_differ_in_slashes_alone_share_no_key() -> None:
    names = ["a/b", "a//b", "/a/b/", "/", "//", "a/c"]
    entries = [Entry(Location("memory://any/0.jpg"), ("a lake",), image_id=name) for name in names]
    found = list(intake.to_records(entries, "", BuildOptions().read, 0))
    assert [row.image_id for row in found if isinstance(row, Record)] == ["a/b", "/", "a/c"]
    assert [row.reason for row in found if not isinstance(row, Record)] == ["duplicate key"] * 3
    assert "the key of 'a//b' in train came before in train" in found[1].detail  # type: ignore[union-attr]
