"""The report counts what is there, finds every doubled image, and is one page that needs nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from helpers.pages import assert_stands_alone
from helpers.shards_data import karpathy, real_data
from helpers.trapped_models import local_dir
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from msa_openclip.shards import BuildOptions, ReadOptions, ShardError, build
from msa_openclip.shards.checks.duplicates import equal_groups, near_groups
from msa_openclip.shards.checks.report import report, text
from msa_openclip.shards.checks.report_page import page
from msa_openclip.shards.command_line import main


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """Seven images with captions of known lengths; image 3 doubles 1, across splits."""
    source = karpathy(tmp_path / "in", {"train": 3, "val": 4}, captions=2)
    content = json.loads(source.read_text())
    for number, row in enumerate(content["images"]):
        row["class"] = "lake" if number % 2 else "wood"
        row["sentences"][0]["raw"] = "word " * (number + 1)
        row["sentences"][1]["raw"] = "the same"
    source.write_text(json.dumps(content))
    (tmp_path / "in/images/3.jpg").write_bytes((tmp_path / "in/images/1.jpg").read_bytes())
    build(str(source), str(tmp_path / "out"), images=str(tmp_path / "in/images"), options=BuildOptions(shards=1))
    return str(tmp_path / "out")


@pytest.mark.parametrize("layout", ["image", "pair"])
def test_counts_are_those_of_the_data_in_both_layouts(shards: str, tmp_path: Path, layout: str) -> None:
    build(shards, str(tmp_path / layout), options=BuildOptions(layout=layout, read=ReadOptions(kind="tar")))
    content = report([str(tmp_path / layout)]).content
    train, val = content["splits"]["train"], content["splits"]["val"]
    assert (train["images"], train["captions"], train["unique_captions"]) == (3, 6, 4)
    assert (val["images"], val["captions"], val["unique_captions"]) == (4, 8, 5)
    assert train["samples"] == (3 if layout == "image" else 6)
    assert train["caption_words"]["histogram"] == {"1": 1, "2": 4, "3": 1}
    assert (val["caption_words"]["min"], val["caption_words"]["max"], val["caption_words"]["median"]) == (2, 7, 3.0)
    assert train["classes"] == {"wood": 2, "lake": 1}
    assert train["sizes"] == {"24x24": 3}
    assert content["same_images"] == {"within": 0, "across": 1, "groups": [["train/1", "val/3"]]}


@pytest.mark.parametrize("layout", ["image", "pair"])
def test_what_splits_share_is_counted_and_warned_of(shards: str, tmp_path: Path, layout: str) -> None:
    """Each image has the caption "the same" and one of its own; image 3 of val is image 1 of train."""
    build(shards, str(tmp_path / layout), options=BuildOptions(layout=layout, read=ReadOptions(kind="tar")))
    found = report([str(tmp_path / layout)])
    content = found.content
    shown = page(found)
    assert "<h2>Captions and images that splits share</h2>" in shown
    assert "<b>Warning:</b> 50% of the captions of val stand in train" in shown
    assert content["shared"] == [
        {"split": "val", "of": "train", "captions": 4, "images": 1, "captions_share": 0.5, "images_share": 0.25}
    ]
    printed = text(content)
    assert "val in train: 4 captions (50.0%), 1 images (25.0%)" in printed
    assert "warning: 50% of the captions of val stand in train; `msa-openclip eval --train-captions` rates" in printed
    assert "warning: 25% of the images of val stand in train; leave them out of one of the two" in printed


def test_case_hides_no_shared_caption_and_few_are_no_warning(tmp_path: Path) -> None:
    source = karpathy(tmp_path / "in", {"train": 3, "test": 6}, captions=2)
    content = json.loads(source.read_text())
    content["images"][5]["sentences"][0]["raw"] = content["images"][0]["sentences"][1]["raw"].upper() + "  "
    source.write_text(json.dumps(content))
    build(str(source), str(tmp_path / "out"), images=str(tmp_path / "in/images"))
    found = report([str(tmp_path / "out")]).content
    assert found["shared"] == [
        {"split": "test", "of": "train", "captions": 1, "images": 0, "captions_share": 1 / 12, "images_share": 0.0}
    ]
    assert "warning" not in text(found)


def test_two_data_sets_are_compared(shards: str, tmp_path: Path) -> None:
    Path(shards).rename(tmp_path / "first")
    source = karpathy(tmp_path / "other", {"test": 2})  # the same two pictures as 0 and 1 of the first
    build(str(source), str(tmp_path / "second"), images=str(tmp_path / "other/images"))
    content = report([str(tmp_path / "first"), str(tmp_path / "second")]).content
    assert list(content["splits"]) == ["first:train", "first:val", "second:test"]
    assert content["same_images"]["groups"] == [
        ["first:train/0", "second:test/0"],
        ["first:train/1", "first:val/3", "second:test/1"],
    ]


def test_look_alikes_survive_resizing_and_recompression(tmp_path: Path) -> None:
    pytest.importorskip("imagehash", reason="imagehash (extra report) is not installed")
    source = karpathy(tmp_path / "in", {"train": 8})
    images = tmp_path / "in/images"
    for number in range(8):
        grid = np.random.default_rng(number).integers(0, 255, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(grid).resize((120, 120), Image.Resampling.BICUBIC).save(images / f"{number}.jpg", quality=95)
    Image.open(images / "2.jpg").resize((80, 80)).save(images / "6.jpg", quality=60)
    build(str(source), str(tmp_path / "out"), images=str(images))
    content = report([str(tmp_path / "out")], near_bits=4).content
    assert content["same_images"]["groups"] == []
    assert content["look_alikes"]["groups"] == [["train/2", "train/6"]]
    assert "1 groups within a split, 0 across splits" in text(content)


def test_missing_imagehash_is_named(shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "imagehash", None)
    with pytest.raises(ShardError, match="pip install imagehash"):
        report([shards], near_bits=2)


@given(
    seeds=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5),
    flips=st.lists(st.tuples(st.integers(0, 4), st.sets(st.integers(0, 63), max_size=6)), max_size=12),
    max_bits=st.integers(0, 5),
)
def test_near_groups_are_those_of_comparing_every_pair(
    seeds: list[int], flips: list[tuple[int, set[int]]], max_bits: int
) -> None:
    values = seeds + [seeds[k % len(seeds)] ^ sum(1 << bit for bit in bits) for k, bits in flips]
    hashes = {f"{number:02d}": value for number, value in enumerate(values)}
    groups = {name: {name} for name in hashes}
    for first in hashes:
        for second in hashes:
            if (hashes[first] ^ hashes[second]).bit_count() <= max_bits and groups[first] is not groups[second]:
                joined = groups[first] | groups[second]
                for name in joined:
                    groups[name] = joined
    expected = sorted(sorted(group) for group in {id(g): g for g in groups.values()}.values() if len(group) > 1)
    assert near_groups(hashes, max_bits) == expected


def test_equal_groups() -> None:
    assert equal_groups({"a": "x", "b": "y", "c": "x", "d": "z", "e": "y"}) == [["a", "c"], ["b", "e"]]


def test_token_lengths_are_those_of_the_models_tokenizer(shards: str) -> None:
    import open_clip

    row = report([shards], tokenizer="ViT-B-32").content["splits"]["val"]["caption_tokens"]
    ids = open_clip.get_tokenizer("ViT-B-32")(["word " * count for count in (4, 5, 6, 7)] + ["the same"] * 4)
    assert sum(int(length) * count for length, count in row["histogram"].items()) == int((ids != 0).sum())
    assert (row["context_length"], row["cut_off_share"]) == (77, 0.0)
    with pytest.raises(ShardError, match=r"open_clip has no model 'ViT-B32'; .*ViT-B-32"):
        report([shards], tokenizer="ViT-B32")


def test_a_tokenizer_that_brings_code_does_not_run_it(shards: str, tmp_path: Path, tiny_bert: Path) -> None:
    spec = local_dir(tmp_path / "model", tiny_bert, tmp_path / "trap", "tokenizer", plain=True, trust_remote_code=True)
    with pytest.raises(ShardError, match=r"text_cfg\.tokenizer_kwargs\.trust_remote_code, which would run"):
        report([shards], tokenizer=spec)
    assert not (tmp_path / "trap").exists()


def test_captions_beyond_the_context_are_counted_as_cut_off(tmp_path: Path) -> None:
    source = karpathy(tmp_path / "in", {"train": 4}, captions=1)
    content = json.loads(source.read_text())
    content["images"][2]["sentences"][0]["raw"] = "tree " * 200
    source.write_text(json.dumps(content))
    build(str(source), str(tmp_path / "out"), images=str(tmp_path / "in/images"))
    row = report([str(tmp_path / "out")], tokenizer="ViT-B-32").content["splits"]["train"]["caption_tokens"]
    assert (row["max"], row["cut_off_share"]) == (202, 0.25)


def test_page_stands_alone_and_escapes_captions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib (extra plot) is not installed")
    source = karpathy(tmp_path / "in", {"train": 9}, captions=2)
    source.write_text(source.read_text().replace("picture 4 says", "<script>alert(4)</script>"))
    content = json.loads(source.read_text())
    content["images"][2]["class"] = r"<b>$\frac{"  # matplotlib would read a formula, and fail
    source.write_text(json.dumps(content))
    out = str(tmp_path / "$x$<i>")
    assert main(["build", str(source), out, "--images", str(tmp_path / "in/images"), "--quiet", "--report",
                 "--workers", "1"]) == 0  # fmt: skip
    html = Path(out, "report.html").read_text()
    assert not re.search(r"<(b>\$|i>)", html)
    assert r"<td>&lt;b&gt;$\frac{</td>" in html
    assert "&lt;script&gt;alert(4)&lt;/script&gt;" in html
    assert_stands_alone(html)
    assert html.count("data:image/jpeg") == 9
    assert json.loads(Path(out, "report.json").read_text())["splits"]["train"]["images"] == 9
    capsys.readouterr()
    assert main(["info", out, "--quiet", "--json", str(tmp_path / "again.json")]) == 0
    assert "train: 9 samples, 9 images, 18 captions" in capsys.readouterr().out
    assert (tmp_path / "again.json").read_bytes() == Path(out, "report.json").read_bytes()


def test_real_ucm_shows_its_known_duplicates(tmp_path: Path) -> None:
    folder = real_data("ucm")
    build(str(folder / "dataset_ucm.json"), str(tmp_path / "out"), images=str(folder / "images"))
    content = report([str(tmp_path / "out")]).content
    assert content["splits"]["test"]["unique_captions"] == 377
    assert content["same_images"]["groups"] == [["train/102", "train/103"]]
    shares = {row["split"]: row["captions_share"] for row in content["shared"] if row["of"] == "train"}
    assert shares == pytest.approx({"val": 0.63, "test": 0.55}, abs=0.01)
    assert sum(row["images"] - row["sizes"]["256x256"] for row in content["splits"].values()) == 44


def test_page_shows_captions_of_images_that_pillow_cannot_read(shards: str) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib (extra plot) is not installed")
    made = report([shards])
    html = page(made._replace(shown=[seen._replace(images=[b"no image"]) for seen in made.shown]))
    assert "data:image/jpeg" not in html
    assert html.count("(no image that Pillow reads)") == 7
    assert "word word" in html
