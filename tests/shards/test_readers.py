"""Every reader gives the captions and splits of its format, is detected, and refuses what it cannot read clearly."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from helpers.shards_data import karpathy, picture, picture_bytes, real_data, tar_members
from PIL import Image

from msa_openclip.shards import BuildOptions, ReadOptions, ShardError, build
from msa_openclip.shards.readers.formats import detect, read
from msa_openclip.shards.records import Entry, Rejection, class_words


def entries(source: Path | str, **options: Any) -> list[Entry]:
    found = list(read(str(source), ReadOptions(**options)))
    assert not [row for row in found if isinstance(row, Rejection)]
    return [row for row in found if isinstance(row, Entry)]


def built_captions(out: Path) -> dict[str, tuple[str, ...]]:
    """Captions by image id, over all shards."""
    rows = [json.loads(d) for p in sorted(out.glob("*.tar")) for n, d in tar_members(p) if n.endswith(".json")]
    return {row["image_id"]: tuple(row["captions"]) for row in rows}


def save_pictures(folder: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / name)


def test_karpathy_reads_raw_not_tokens(tmp_path: Path) -> None:
    source = karpathy(tmp_path / "in", {"train": 2, "test": 1}, captions=3)
    assert detect(str(source))[0] == "karpathy"
    found = entries(source)
    assert [(row.image, row.split) for row in found] == [("0.jpg", "train"), ("1.jpg", "train"), ("2.jpg", "test")]
    assert found[1].captions == ("picture 1 says 0 .", "picture 1 says 1 .", "picture 1 says 2 .")


def test_karpathy_of_real_ucm_has_its_published_counts() -> None:
    found = entries(real_data("ucm") / "dataset_ucm.json")
    by_split = {split: sum(row.split == split for row in found) for split in ("train", "val", "test")}
    assert by_split == {"train": 1680, "val": 210, "test": 210}
    assert all(len(row.captions) == 5 for row in found)


def test_nwpu_lists_by_class(tmp_path: Path) -> None:
    source = tmp_path / "dataset_nwpu.json"
    raws = {"raw": "a", "raw_1": "b", "raw_2": "c", "raw_3": "d", "raw_4": "e"}
    row = {"filename": "airport_1.jpg", "split": "val", "imgid": 0, **raws}
    source.write_text(json.dumps({"airport": [row], "beach": []}))
    assert detect(str(source))[0] == "nwpu"
    assert entries(source) == [Entry("airport_1.jpg", ("a", "b", "c", "d", "e"), "val", "airport")]


@pytest.mark.parametrize("per_caption", [False, True])
def test_precomp_names_per_image_or_per_caption(tmp_path: Path, per_caption: bool) -> None:
    (tmp_path / "test_caps.txt").write_text("".join(f"caption {n}\n" for n in range(6)))
    names = ["a.tif", "a.tif", "b.tif", "b.tif", "c.tif", "c.tif"] if per_caption else ["a.tif", "b.tif", "c.tif"]
    (tmp_path / "test_filename.txt").write_text("\n".join(names) + "\n")
    assert detect(str(tmp_path))[0] == "precomp"
    assert entries(tmp_path) == [
        Entry("a.tif", ("caption 0", "caption 1"), "test"),
        Entry("b.tif", ("caption 2", "caption 3"), "test"),
        Entry("c.tif", ("caption 4", "caption 5"), "test"),
    ]


def test_blank_captions_at_the_end_of_precomp_are_counted(tmp_path: Path) -> None:
    (tmp_path / "test_caps.txt").write_text("a0\na1\na2\nb0\nb1\nb2\n\n\n\n")
    (tmp_path / "test_filename.txt").write_text("a.tif\nb.tif\nc.tif\n\n")
    assert [row.captions for row in entries(tmp_path)] == [("a0", "a1", "a2"), ("b0", "b1", "b2"), ("", "", "")]


def test_blank_lines_that_cannot_be_captions_are_none(tmp_path: Path) -> None:
    (tmp_path / "test_caps.txt").write_text("a0\na1\nb0\n\n\n\n")
    (tmp_path / "test_filename.txt").write_text("a.tif\nb.tif\n")
    assert [row.captions for row in entries(tmp_path)] == [("a0", "a1", "b0"), ("", "", "")]
    (tmp_path / "test_caps.txt").write_text("a0\na1\nb0\n\n\n")
    assert [row.captions for row in entries(tmp_path)] == [("a0", "a1"), ("b0", "")]


def test_precomp_of_another_length_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train_caps.txt").write_text("a\nb\nc\n")
    (tmp_path / "train_filename.txt").write_text("x.jpg\ny.jpg\n")
    with pytest.raises(ShardError, match=r"train_caps.txt: 3 captions cannot be shared evenly by 2 file names"):
        entries(tmp_path)


def test_real_rsitmd_captions_build_with_generated_images(tmp_path: Path) -> None:
    source = real_data("rsitmd_precomp")
    names = {name for split in ("train", "test") for name in (source / f"{split}_filename.txt").read_text().split()}
    one = io.BytesIO()
    Image.new("RGB", (8, 8), (90, 100, 60)).save(one, "TIFF")
    for name in names:
        (tmp_path / name).write_bytes(one.getvalue())
    summary = build(str(source), str(tmp_path / "out"), images=str(tmp_path), options=BuildOptions(name="rsitmd"))
    assert summary.splits["train"]["images"] == 4291 - 4  # all five captions of four images are blank
    assert summary.splits["test"]["captions"] == 2260
    assert summary.rejected == {"blank caption": 20, "no captions": 4}
    assert summary.splits["train"]["captions"] == 21455 - 20


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_tables_with_several_caption_columns(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"filepath": "x/0.jpg", "title": "a field, green", "title_multi_objects": "many", "split": "train"},
        {"filepath": "x/1.jpg", "title": 'a "round" pond', "title_multi_objects": "", "split": "val"},
    ]
    source = tmp_path / f"list.{suffix}"
    if suffix == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow (extra parquet) is not installed")
        import pyarrow

        parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    else:
        with source.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="," if suffix == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    assert detect(str(source))[0] == "table"
    assert [(row.image, row.captions, row.split) for row in entries(source)] == [
        ("x/0.jpg", ("a field, green",), "train"),
        ("x/1.jpg", ('a "round" pond',), "val"),
    ]
    both = entries(source, caption_columns=("title", "title_multi_objects"))
    assert both[0].captions == ("a field, green", "many")


def test_table_rows_of_one_image_are_put_together_wherever_they_are(tmp_path: Path) -> None:
    source = tmp_path / "open_clip.csv"
    source.write_text("filepath\tcaption\n0.jpg\ta\n0.jpg\tb\n1.jpg\tc\n0.jpg\td\n")
    assert [(row.image, row.captions) for row in entries(source)] == [("0.jpg", ("a", "b", "d")), ("1.jpg", ("c",))]


def test_table_problems_name_the_column_or_the_line(tmp_path: Path) -> None:
    source = tmp_path / "list.csv"
    source.write_text("where,what\n0.jpg,a\n")
    with pytest.raises(ShardError, match=r"no column looks like the image among where, what; name it: --image-column"):
        entries(source)
    with pytest.raises(ShardError, match=r"no column 'colour'; it has where, what"):
        entries(source, image_column="where", caption_columns=("colour",))
    source.write_text("path,caption\n0.jpg,a, b\n")
    with pytest.raises(ShardError, match=r"line 2 has not as many fields"):
        entries(source)


def test_class_folders_with_and_without_splits(tmp_path: Path) -> None:
    save_pictures(tmp_path / "plain", ["BaseballField/1.jpg", "storage_tank/1.jpg", "storage_tank/2.png"])
    assert detect(str(tmp_path / "plain"))[0] == "folder"
    options = ReadOptions(templates=("a photo of {}.",))
    out = tmp_path / "out"
    summary = build(str(tmp_path / "plain"), str(out), options=BuildOptions(shards=1, read=options))
    assert summary.splits["train"]["samples"] == 3
    assert built_captions(out) == {
        "BaseballField/1": ("a photo of baseball field.",),
        "storage_tank/1": ("a photo of storage tank.",),
        "storage_tank/2": ("a photo of storage tank.",),
    }
    save_pictures(tmp_path / "split", ["train/lake/1.jpg", "validation/lake/1.jpg"])
    assert [(row.split, row.label) for row in entries(tmp_path / "split")] == [
        ("train", "lake"),
        ("validation", "lake"),
    ]
    assert class_words("Dense-Residential") == "dense residential"


def test_holdout_is_a_stable_share(tmp_path: Path) -> None:
    save_pictures(tmp_path / "in", [f"lake/{number}.jpg" for number in range(120)])

    def images(out: str) -> set[str]:
        options = BuildOptions(shards=1, read=ReadOptions(holdout=("val=0.25",)))
        build(str(tmp_path / "in"), str(tmp_path / out), options=options)
        return {n[:-4] for n, _ in tar_members(tmp_path / out / "val-000000.tar") if n.endswith(".jpg")}

    before = images("a")
    assert 15 <= len(before) <= 45
    for number in range(60):
        (tmp_path / f"in/lake/{number}.jpg").unlink()
    assert images("b") == {name for name in before if int(name.split("/")[1]) >= 60}


def test_a_missing_val_split_is_held_out_of_train_and_test_is_left_alone(tmp_path: Path) -> None:
    source = karpathy(tmp_path / "in", {"train": 80, "test": 20})
    options = BuildOptions(shards=1, read=ReadOptions(holdout=("val=0.2",)))
    summary = build(str(source), str(tmp_path / "out"), images=str(tmp_path / "in/images"), options=options)
    counts = {split: row["images"] for split, row in summary.splits.items()}
    assert counts["test"] == 20
    assert counts["train"] + counts["val"] == 80
    assert 8 <= counts["val"] <= 26


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"holdout": ("val=0.5", "val=0.6")}, "holdout: val comes twice, as 0.5 and 0.6"),
        ({"split_map": ("val=train", "val=test")}, "split_map: val comes twice, as train and test"),
        ({"holdout": ("val",)}, "holdout: 'val' must read like NAME=VALUE"),
        ({"holdout": ("val=x",)}, "must read like val=0.1"),
    ],
)
def test_splits_that_options_name_twice_or_badly_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ShardError, match=message):
        ReadOptions(**options)
    assert ReadOptions(split_map=("dev=test",)).renames["dev"] == "test"


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


ODD = ('"runway"', '["x", "y"]', "[1]", r'"\u0041 b"', '["z"]', "plain")


@pytest.mark.parametrize("layout", ["image", "pair"])
def test_captions_in_quotes_and_brackets_are_resharded_as_they_are(tmp_path: Path, layout: str) -> None:
    rows = [{"filename": f"{number}.jpg", "split": "train", "sentences": [{"raw": caption}, {"raw": "second"}]}
            for number, caption in enumerate(ODD)]  # fmt: skip
    save_pictures(tmp_path, [row["filename"] for row in rows])
    (tmp_path / "c.json").write_text(json.dumps({"images": rows}))
    first, again = tmp_path / "first", tmp_path / "again"
    build(str(tmp_path / "c.json"), str(first), options=BuildOptions(shards=1, layout=layout))
    build(str(first), str(again), options=BuildOptions(shards=1))
    assert built_captions(again) == {str(number): (caption, "second") for number, caption in enumerate(ODD)}


def test_captions_of_other_tars_may_be_json(tmp_path: Path) -> None:
    texts = ['"a lake"', '["a", null, "b"]', "[1, 2]\n[sic]\n", '["c"]\n', '"d" and\ne']
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for number, text in enumerate(texts):
            add(tar, f"{number}.jpg", picture_bytes(number))
            add(tar, f"{number}.txt", text.encode())
    build(str(tmp_path / "00000.tar"), str(tmp_path / "out"))
    assert built_captions(tmp_path / "out") == {
        "0": ("a lake",), "1": ("a", "b"), "2": ("[1, 2]", "[sic]"), "3": ("c",), "4": ('"d" and', "e"),
    }  # fmt: skip


@pytest.mark.parametrize("layout", ["image", "pair"])
def test_sets_of_one_name_lose_no_images_when_joined(tmp_path: Path, layout: str) -> None:
    sets = []
    for above, splits in (("A", {"train": 2, "val": 1}), ("B", {"train": 3})):
        source = karpathy(tmp_path / above / "in", splits, captions=2)
        out, options = tmp_path / above / "ucm", BuildOptions(shards=1, layout=layout)
        build(str(source), str(out), images=str(source.parent / "images"), options=options)
        sets.append(str(out))
    joined = "::".join((f"{sets[0]}/train-000000.tar", f"{sets[0]}/val-000000.tar", sets[1]))
    summary = build(joined, str(tmp_path / "out"), options=BuildOptions(shards=1))
    assert summary.rejected == {}
    names = {"ucm/0", "ucm/1", "ucm/2", "ucm-2/0", "ucm-2/1", "ucm-2/2"}
    assert {name: len(captions) for name, captions in built_captions(tmp_path / "out").items()} == dict.fromkeys(
        names, 2
    )


def test_rs5m_like_tars(tmp_path: Path) -> None:
    for shard in range(2):
        with tarfile.open(tmp_path / f"pub11-train-{shard:04d}.tar", "w") as tar:
            for number in range(3):
                key = f"{shard}{number}"
                add(tar, f"{key}.img_content", picture_bytes(int(key)))
                add(tar, f"{key}.img_name", f"{key}.jpg".encode())
                add(tar, f"{key}.caption", f"satellite view {key}".encode())
    pattern = str(tmp_path / "pub11-train-{0000..0001}.tar")
    assert detect(pattern)[0] == "tar"
    assert detect(str(tmp_path))[0] == "tar"
    summary = build(pattern, str(tmp_path / "out"), options=BuildOptions(shards=1, layout="pair"))
    assert summary.splits["train"]["samples"] == 6
    members = dict(tar_members(tmp_path / "out/train-000000.tar"))
    assert members["12+0.jpg"] == picture_bytes(12)
    assert members["12+0.txt"] == b"satellite view 12"


def test_img2dataset_like_tars_take_the_json_caption_and_report_samples_without_image(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        add(tar, "000.jpg", picture_bytes(1))
        add(tar, "000.json", json.dumps({"caption": "from json", "url": "u", "status": "success"}).encode())
        add(tar, "001.txt", b"no image here")
    summary = build(str(tmp_path / "00000.tar"), str(tmp_path / "out"))
    assert built_captions(tmp_path / "out") == {"000": ("from json",)}
    assert summary.rejected == {"no image": 1}


def test_saved_hugging_face_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets (extra hf) is not installed")
    features = datasets.Features({
        "image": datasets.Image(), "captions": datasets.Sequence(datasets.Value("string")),
        "label": datasets.ClassLabel(names=["lake", "wood"]),
    })  # fmt: skip
    images = [{"bytes": picture_bytes(number, "PNG"), "path": None} for number in range(5)]
    rows = {"image": images, "captions": [[f"a{n}", f"b{n}"] for n in range(5)], "label": [0, 1, 0, 1, 0]}
    table = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": table, "validation": table.select([0])}).save_to_disk(tmp_path / "in")
    assert detect(str(tmp_path / "in"))[0] == "hf"
    summary = build(str(tmp_path / "in"), str(tmp_path / "out"), options=BuildOptions(shards=1))
    assert {split: row["samples"] for split, row in summary.splits.items()} == {"train": 5, "val": 1}
    members = dict(tar_members(tmp_path / "out/train-000000.tar"))
    assert members["train_00000003.png"] == picture_bytes(3, "PNG")
    metadata = json.loads(members["train_00000003.json"])
    assert (metadata["class"], metadata["captions"]) == ("wood", ["a3", "b3"])


def test_wrong_kinds_and_sources_are_explained(tmp_path: Path) -> None:
    karpathy_like = tmp_path / "c.json"
    karpathy_like.write_text('{"images": [{"file_name": "a.jpg", "id": 1}], "annotations": []}')
    with pytest.raises(
        ShardError, match=r"read as karpathy \(a JSON object with a list 'images'\), but it is not: KeyError"
    ):
        entries(karpathy_like)
    karpathy_like.write_text("[1, 2]")
    with pytest.raises(ShardError, match=r"neither Karpathy JSON .* nor NWPU-Captions JSON"):
        entries(karpathy_like)
    with pytest.raises(ShardError, match=r"c.json: holds no \*_caps.txt"):
        entries(karpathy_like, kind="precomp")
    with pytest.raises(ShardError, match=r"no such file or folder"):
        entries(tmp_path / "absent.json")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/readme.md").write_text("nothing")
    with pytest.raises(
        ShardError, match=r"no \*_caps.txt, no .tar, no saved data set, no image in it; found readme.md"
    ):
        entries(tmp_path / "notes")


def test_images_are_found_in_class_folders_and_ambiguity_is_a_row(tmp_path: Path) -> None:
    save_pictures(tmp_path / "in", ["lake/lake_1.tif", "wood/wood_1.tif", "a/same.jpg", "b/same.jpg"])
    rows = [{"filename": name, "split": "train", "sentences": [{"raw": "x"}]} for name in
            ("lake_1.jpg", "wood_1.tif", "same.jpg")]  # fmt: skip
    (tmp_path / "c.json").write_text(json.dumps({"images": rows}))
    summary = build(str(tmp_path / "c.json"), str(tmp_path / "out"), images=str(tmp_path / "in"))
    assert summary.splits["train"]["samples"] == 2
    row = json.loads((tmp_path / "out/rejected.jsonl").read_text())
    assert (row["file"], row["reason"]) == ("same.jpg", "ambiguous image")
    assert "a/same.jpg and b/same.jpg" in row["detail"]
