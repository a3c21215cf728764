"""Captioned images from shards of both layouts, caption files, CSV and class folders."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from helpers.retrieval_data import preprocess, scene, write_captioned_scenes, write_shards
from helpers.stream_data import FlakyFileSystem, flaky_store

from msa_openclip.data.captioned import EvalDataError
from msa_openclip.data.pixels import batches, load_image
from msa_openclip.data.readers import expand, read_captions, read_class_folder, read_csv, read_shards
from msa_openclip.data.streams import CACHE_VARIABLE
from msa_openclip.evaluation.eval_set import EvalSet
from msa_openclip.training.samples import Tally, read_share
from msa_openclip.training.shares import Share


def png(index: int) -> bytes:
    buffer = io.BytesIO()
    scene(index).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def test_both_layouts_and_the_caption_file_are_the_same_set(tmp_path: Path) -> None:
    image = {i.image_id: i for i in read_shards(write_shards(tmp_path / "a", "image"))}
    pair = {i.image_id: i for i in read_shards(write_shards(tmp_path / "b", "pair"))}
    folder = tmp_path / "a" / "source"
    direct = {i.image_id: i for i in read_captions(str(folder / "captions.json"), str(folder / "images"), split="test")}
    assert len(image) == 7
    assert set(image) == set(pair) == set(direct)
    for key, item in direct.items():
        assert item.captions == image[key].captions
        assert sorted(item.captions) == sorted(pair[key].captions)
        for other in (image[key], pair[key]):
            np.testing.assert_array_equal(np.asarray(load_image(other)), np.asarray(load_image(item)))


def test_distinct_captions_share_a_column(tmp_path: Path) -> None:
    path = write_captioned_scenes(tmp_path / "source")
    data = EvalSet(read_captions(str(path), str(path.parent / "images")), "scenes")
    assert (len(data.images), data.captions, len(data.texts)) == (7, 35, 33)
    said = [(c, i) for i, image in enumerate(data.images) for c in image.captions]
    truth = data.per_caption
    columns, owners = truth.query_column.tolist(), truth.pair_image.tolist()
    assert sorted((data.texts[c], i) for c, i in zip(columns, owners, strict=True)) == sorted(said)
    shared = data.texts.index("a place that two scenes share")
    assert data.merged.pair_image[data.merged.pair_query == shared].tolist() == [0, 1]


def test_pairs_of_other_makers_are_regrouped_by_their_bytes(tmp_path: Path) -> None:
    members = []
    for key, index, text in [("a", 0, "one"), ("b", 1, "two"), ("c", 0, "three\n\nfour ")]:
        members += [(f"{key}.png", png(index)), (f"{key}.txt", text.encode())]
    found = read_shards(write_tar(tmp_path / "x.tar", members))
    assert [image.captions for image in found] == [("one", "three", "four"), ("two",)]


def test_several_patterns_and_pipes(tmp_path: Path) -> None:
    for name, index in (("x0", 0), ("x1", 1), ("y", 2)):
        write_tar(tmp_path / f"{name}.tar", [(f"{name}.png", png(index)), (f"{name}.txt", name.encode())])
    pattern = f"{tmp_path}/x{{0..1}}.tar::pipe:cat {tmp_path}/y.tar"
    found = read_shards(pattern)
    assert [image.captions for image in found] == [("x0",), ("x1",), ("y",)]
    np.testing.assert_array_equal(np.asarray(load_image(found[2])), np.asarray(scene(2)))


def test_csv_lines_of_one_image_belong_together(tmp_path: Path) -> None:
    scene(3).save(tmp_path / "3.png")
    table = tmp_path / "val.csv"
    table.write_text(f"filepath\ttitle\n{tmp_path}/3.png\tfirst\n{tmp_path}/3.png\tsecond\n")
    (image,) = read_csv(str(table), "filepath", "title")
    assert image.captions == ("first", "second")
    with pytest.raises(EvalDataError, match=r"val\.csv: no column 'caption'; it has filepath, title"):
        read_csv(str(table), "filepath", "caption")


def test_missing_captions_in_a_csv_are_no_captions(tmp_path: Path) -> None:
    """One rule for what says nothing, whoever reads it: in tables, in the texts of shards, in training."""
    said = {
        "nan": (),
        "None": (),
        "[null]": (),
        "<NA>": (),
        " ": (),
        '["a lake", null, "a pond"]': ("a lake", "a pond"),
    }
    table = tmp_path / "val.csv"
    table.write_text("filepath|title\n" + "".join(f"{n}.png|{text}\n" for n, text in enumerate(map(quoted, said))))
    assert [image.captions for image in read_csv(str(table), "filepath", "title", "|")] == list(said.values())
    members = [(f"{n}.{kind}", data) for n, text in enumerate(("nan", "a lake\nNone"))
               for kind, data in (("png", png(n)), ("txt", text.encode()))]  # fmt: skip
    url = write_tar(tmp_path / "x.tar", members)
    assert [image.captions for image in read_shards(url)] == [(), ("a lake",)]
    tally = Tally()
    assert [sample["captions"] for sample in read_share(Share(url), tally)] == [["a lake"]]
    assert dict(tally.reasons) == {"captions are blank": 1}


def quoted(cell: str) -> str:
    doubled = cell.replace('"', '""')
    return f'"{doubled}"'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path\ttitle\ttitle\na\tb\tc\n", "two columns are called 'title'"),
        ("path\ttitle\na.jpg\n", "line 2 has not as many fields as the header"),
        ("path\ttitle\n\ta lake\n", "a row names no image in column 'path'"),
    ],
)
def test_what_a_csv_must_not_hold_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(EvalDataError, match=rf"c\.csv: .*{message}"):
        read_csv(str(tmp_path / "c.csv"), "path", "title")


def test_class_folder(tmp_path: Path) -> None:
    for name in ("beach", "forest"):
        (tmp_path / name).mkdir()
        scene(1).save(tmp_path / name / "1.tif")
    found = read_class_folder(str(tmp_path))
    assert [image.label for image in found] == ["beach", "forest"]
    assert load_image(found[0]).size == (24, 24)
    with pytest.raises(EvalDataError, match="no images below class folders"):
        read_class_folder(str(tmp_path / "beach"))


def test_batches_leave_the_random_generator_alone(tmp_path: Path) -> None:
    path = write_captioned_scenes(tmp_path / "source")
    images = read_captions(str(path), str(path.parent / "images"))
    state = torch.get_rng_state()
    pixels = torch.cat(list(batches(images, preprocess, [range(3), range(5, 7)])))
    assert torch.equal(torch.get_rng_state(), state)
    expected = torch.stack([preprocess(scene(i)) for i in (0, 1, 2, 5, 6)])
    torch.testing.assert_close(pixels, expected, rtol=0, atol=0)


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Shards of the seven scenes in a store that fails when asked to."""
    pattern = write_shards(tmp_path)
    with flaky_store(monkeypatch) as folder:
        for path in Path(pattern).parent.glob("*.tar"):
            MemoryFileSystem().pipe(f"/flaky/{path.name}", path.read_bytes())
        yield f"{folder}/{Path(pattern).name}"


def test_a_store_that_fails_now_and_then(remote: str) -> None:
    FlakyFileSystem.failures = [True, False, True, False, False, True]
    found = read_shards(remote)
    assert len(found) == 7
    assert found[0].location.url.startswith("flaky://")
    FlakyFileSystem.failures = [True, False] * 7
    pixels = [np.asarray(load_image(image)) for image in found]
    assert FlakyFileSystem.failures == []
    names = [int(image.image_id.rsplit("_")[-1]) for image in found]
    for number, picture in zip(names, pixels, strict=True):
        np.testing.assert_array_equal(picture, np.asarray(scene(number)))


def test_shards_on_s3_are_the_local_ones(bucket: str, tmp_path: Path) -> None:
    pattern = write_shards(tmp_path)
    for path in Path(pattern).parent.glob("*.tar"):
        with fsspec.open(f"{bucket}/{path.name}", "wb") as file:
            file.write(path.read_bytes())
    found = read_shards(f"{bucket}/{Path(pattern).name}")
    for mine, local in zip(found, read_shards(pattern), strict=True):
        assert (mine.image_id, mine.captions) == (local.image_id, local.captions)
        np.testing.assert_array_equal(np.asarray(load_image(mine)), np.asarray(load_image(local)))


def test_with_a_cache_every_shard_is_fetched_once(remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    found = read_shards(remote)
    assert FlakyFileSystem.opened == 2
    assert {image.location.url for image in found} == set(expand(remote))  # copies come and go, an index stays
    before = [np.asarray(load_image(image)) for image in found]
    FlakyFileSystem.failures = [True] * 1000
    for image, picture in zip(found, before, strict=True):
        np.testing.assert_array_equal(np.asarray(load_image(image)), picture)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.tif", b"x"), ("a.txt", b"x")], r"bad\.tar: sample a has tif, txt; it needs KEY\.txt and one of KEY\.jpg"),
        ([("a.png", b"x")], "sample a has png; it needs"),
        ([("a.png", b"x"), ("a.txt", b"x"), ("a.json", b"{")], r"bad\.tar: not a readable shard \(JSONDecodeError"),
    ],
)
def test_samples_that_open_clip_would_drop_are_named(tmp_path: Path, members, message: str) -> None:
    with pytest.raises(EvalDataError, match=message):
        read_shards(write_tar(tmp_path / "bad.tar", members))


def test_other_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvalDataError, match=r"none\.tar: FileNotFoundError. Check the name"):
        read_shards(str(tmp_path / "none.tar"))
    (tmp_path / "text.tar").write_bytes(b"no tar at all, but long enough to look at" * 40)
    with pytest.raises(EvalDataError, match=r"text\.tar: not a readable shard"):
        read_shards(str(tmp_path / "text.tar"))
    broken = read_shards(write_tar(tmp_path / "x.tar", [("a.png", png(0)[:60]), ("a.txt", b"cut")]))
    with pytest.raises(EvalDataError, match=r"x\.tar: image sha256:\w+ cannot be read"):
        load_image(broken[0])
    path = write_captioned_scenes(tmp_path / "source")
    with pytest.raises(EvalDataError, match="no image in split 'val'"):
        read_captions(str(path), str(path.parent / "images"), split="val")
    (path.parent / "images" / "harbor_0.png").unlink()
    with pytest.raises(EvalDataError, match=r"1 unusable, first harbor_0\.png: missing image"):
        read_captions(str(path), str(path.parent / "images"))
    row = {"filename": "forest_1.png", "split": "test", "sentences": [{"raw": "  "}]}
    path.write_text(json.dumps({"images": [row]}))
    with pytest.raises(EvalDataError, match="no image"):
        EvalSet(read_captions(str(path), str(path.parent / "images")), "scenes")
    with pytest.raises(EvalDataError, match="0 images with no caption at all"):
        EvalSet([], "nothing")


@pytest.mark.parametrize("text", ['path\ttitle\na.jpg\t"a lake\nb.jpg\ta pond"\n', 'path\ttitle\na.jpg\t"a lake\n'])
def test_a_stray_quote_in_a_csv_takes_in_no_rows(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(
        EvalDataError,
        match=r"c\.csv: .*(a quoted field goes on over other rows|unexpected end of data); is a quote stray",
    ):
        read_csv(str(tmp_path / "c.csv"), "path", "title")
