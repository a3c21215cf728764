"""Samples of several dates: how they are read, laid out, checked, resumed and refused."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.shards_data import picture, shard_bytes, tar_members

from msa_openclip.shards import BuildOptions, ShardError, build, verify
from msa_openclip.shards.building import build as building
from msa_openclip.shards.checks import report
from msa_openclip.shards.clip_benchmark import link_for_clip_benchmark
from msa_openclip.shards.command_line import main
from msa_openclip.shards.imagery.geotiff import tiled
from msa_openclip.shards.options import ImageOptions, ReadOptions
from msa_openclip.shards.readers import formats, intake
from msa_openclip.shards.records import Entry, Location, Record, Rejection
from msa_openclip.shards.synthetic.changes import NOTHING, change
from msa_openclip.shards.synthetic.scenes import synthesize
from msa_openclip.shards.synthetic.words import place


def levir_cc(folder: Path, pairs: int = 4) -> Path:
    """The published layout: LevirCCcaptions.json beside images/SPLIT/A and images/SPLIT/B."""
    rows = []
    for number in range(pairs):
        split = "train" if number < pairs - 1 else "test"
        name = f"{split}_{number:06d}.png"
        for date, side in enumerate("AB"):
            (folder / "images" / split / side).mkdir(parents=True, exist_ok=True)
            picture(2 * number + date).save(folder / "images" / split / side / name)
        sentences = [{"raw": f" pair {number} says {index} .", "tokens": ["wrong"]} for index in range(5)]
        flag = number % 2
        rows.append({"filepath": split, "filename": name, "imgid": number, "split": split, "changeflag": flag,
                     "sentences": sentences, "sentids": [0]})  # fmt: skip
    path = folder / "LevirCCcaptions.json"
    path.write_text(json.dumps({"images": rows, "dataset": "LEVIR_CC"}))
    return path


def series(folder: Path, rows: list[list[str]], dates: list[Any] | None = None, **more: Any) -> Path:
    """A JSON list whose samples name several images."""
    folder.mkdir(exist_ok=True)
    content = []
    for number, names in enumerate(rows):
        for at, name in enumerate(names):
            if not (folder / name).exists():
                picture(100 * number + at).save(folder / name)
        about = {} if dates is None else {"dates": dates}
        content.append({"filenames": names, "sentences": [{"raw": f"place {number}"}], **about, **more})
    path = folder / "series.json"
    path.write_text(json.dumps({"images": content}))
    return path


def members_of(folder: Path) -> dict[str, bytes]:
    return {name: data for path in sorted(folder.glob("*.tar")) for name, data in tar_members(path)}


def test_levir_cc_becomes_pairs_in_order_of_date(tmp_path: Path) -> None:
    captions = levir_cc(tmp_path / "in")
    assert formats.detect(str(captions))[0] == "levir-cc"
    summary = build(str(captions), str(tmp_path / "out"), images=str(tmp_path / "in/images"))
    assert not summary.rejected
    assert summary.splits["train"]["samples"] == 3
    found = members_of(tmp_path / "out")
    key = "train/train_000001"
    before = (tmp_path / "in/images/train/A/train_000001.png").read_bytes()
    after = (tmp_path / "in/images/train/B/train_000001.png").read_bytes()
    assert [name for name in found if name.startswith(f"{key}.")] == [
        f"{key}.{x}" for x in ("0.png", "1.png", "txt", "json")
    ]
    assert (found[f"{key}.0.png"], found[f"{key}.1.png"]) == (before, after)
    metadata = json.loads(found[f"{key}.json"])
    assert metadata["dates"] == [None, None]
    assert (metadata["class"], metadata["dataset"]) == ("change", "LEVIR_CC")
    assert json.loads(found["train/train_000000.json"])["class"] == "no change"
    assert metadata["sha256"] == hashlib.sha256(before + after).hexdigest()
    assert found[f"{key}.txt"].decode().splitlines()[0] == "pair 1 says 0 ."
    assert json.loads((tmp_path / "out/manifest.json").read_text())["dates"] == 2
    assert verify(str(tmp_path / "out"), decode=True).ok


def test_a_json_list_names_the_images_of_a_series_and_their_dates(tmp_path: Path) -> None:
    source = series(tmp_path / "in", [["a0.png", "a1.png", "a2.png"]], ["2015", None, "2020-06-30"], split="val")
    build(str(source), str(tmp_path / "out"))
    found = members_of(tmp_path / "out")
    assert [found[f"a0.{date}.png"] for date in range(3)] == [
        (tmp_path / f"in/a{d}.png").read_bytes() for d in range(3)
    ]
    assert json.loads(found["a0.json"])["dates"] == ["2015", None, "2020-06-30"]


@pytest.mark.parametrize(
    ("dates", "what"),
    [
        (["2020", "2015"], "in order of date"),
        (["2020"], "2 filenames and 1 dates"),
        (["2020", "spring"], r"dates\[1\]: 'spring' where an ISO date"),
        ("2020", r"dates: '2020' where a list"),
    ],
)
def test_dates_that_make_no_series_are_refused_with_their_place(tmp_path: Path, dates: Any, what: str) -> None:
    source = series(tmp_path / "in", [["a.png", "b.png"]], dates)
    with pytest.raises(ShardError, match=rf"images\[0\].*{what}"):
        build(str(source), str(tmp_path / "out"))


def test_another_number_of_dates_is_rejected_by_name(tmp_path: Path) -> None:
    source = series(tmp_path / "in", [["a.png", "b.png"], ["c.png"], ["d.png", "e.png", "f.png"], ["g.png", "h.png"]])
    summary = build(str(source), str(tmp_path / "out"))
    assert summary.rejected == {"number of dates": 2}
    rows = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == ["c.png", "d.png"]
    assert rows[0]["detail"] == "1 where a.png, the first, has 2"
    assert summary.splits["train"]["samples"] == 2


def test_a_missing_date_is_not_replaced_by_the_file_of_another(tmp_path: Path) -> None:
    """Names are looked up without their folders, too: A's image would stand for B's."""
    captions = levir_cc(tmp_path / "in")
    (tmp_path / "in/images/train/B/train_000001.png").unlink()
    summary = build(str(captions), str(tmp_path / "out"), images=str(tmp_path / "in/images"))
    assert summary.rejected == {"missing image": 1}
    assert "image of another date" in (tmp_path / "out/rejected.jsonl").read_text()


def test_dates_of_different_sizes_are_rejected_unless_they_are_made_one(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    picture(1, (24, 24)).save(tmp_path / "in/a.png")
    picture(2, (30, 24)).save(tmp_path / "in/b.png")
    source = series(tmp_path / "in", [["a.png", "b.png"], ["c.png", "d.png"]])
    summary = build(str(source), str(tmp_path / "out"))
    assert summary.rejected == {"unreadable image": 1}
    assert "24 x 24, 30 x 24; --resize-px" in (tmp_path / "out/rejected.jsonl").read_text()
    flags = ["--resize-px", "20", "--resize-mode", "squash", "--workers", "1", "--quiet"]
    assert main(["build", str(source), str(tmp_path / "squashed"), *flags]) == 0
    assert len(members_of(tmp_path / "squashed")) == 8


def test_pairs_are_resharded_to_the_same_bytes_by_way_of_the_pair_layout(tmp_path: Path) -> None:
    options = BuildOptions(shards=2)
    build(str(levir_cc(tmp_path / "in")), str(tmp_path / "a"), images=str(tmp_path / "in/images"), options=options)
    build(str(tmp_path / "a"), str(tmp_path / "pair"), options=BuildOptions(layout="pair", shards=3))
    assert "train/train_000001+4.1.png" in members_of(tmp_path / "pair")
    assert verify(str(tmp_path / "pair"), decode=True).ok
    build(str(tmp_path / "pair"), str(tmp_path / "b"), options=options)
    assert shard_bytes(tmp_path / "a") == shard_bytes(tmp_path / "b")


def test_a_build_goes_on_but_for_shards_with_a_later_date_that_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = series(tmp_path / "in", [[f"{number}_a.png", f"{number}_b.png"] for number in range(8)])
    options = BuildOptions(shards=4)
    build(str(source), str(tmp_path / "whole"), options=options)
    write, calls = building.write_shard, iter(range(9))

    def write_three(job: Any) -> Any:
        if next(calls) == 3:
            raise RuntimeError("killed")
        return write(job)

    monkeypatch.setattr(building, "write_shard", write_three)
    with pytest.raises(RuntimeError, match="killed"):
        build(str(source), str(tmp_path / "out"), options=options, engine="thread")
    monkeypatch.undo()
    first = json.loads(next(iter((tmp_path / "out/.build").glob("train-000000.tar.json"))).read_text())
    key = next(name for name in dict(tar_members(tmp_path / "out/train-000000.tar")) if name.endswith(".1.png"))
    assert first["samples"] == 2
    later = tmp_path / "in" / key.replace("_a.1.png", "_b.png")
    picture(999).save(later)
    os.utime(later, ns=(1, 1))
    summary = build(str(source), str(tmp_path / "out"), options=options)
    assert summary.resumed_shards == 2
    assert dict(tar_members(tmp_path / "out/train-000000.tar"))[key] == later.read_bytes()
    assert (tmp_path / "out/train-000001.tar").read_bytes() == (tmp_path / "whole/train-000001.tar").read_bytes()


def test_verify_and_info_see_every_date(tmp_path: Path) -> None:
    source = series(tmp_path / "in", [["a.png", "b.png", "c.png"], ["d.png", "e.png", "f.png"]])
    build(str(source), str(tmp_path / "out"), options=BuildOptions(shards=1))
    content = report.report([str(tmp_path / "out")], near_bits=2).content
    assert content["splits"]["train"]["dates"] == [3]
    assert "3 dates of each place" in report.text(content)
    assert main(["info", str(tmp_path / "out"), "--html", str(tmp_path / "page.html"), "--quiet"]) == 0

    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    manifest["dates"] = 2  # as if the last date of each sample had come from elsewhere
    (tmp_path / "out/manifest.json").write_text(json.dumps(manifest))
    found = verify(str(tmp_path / "out"), decode=True)
    assert [problem.what.split("; ")[1] for problem in found.problems] == [
        "expected images of 2 dates, txt and json"
    ] * 2
    with pytest.raises(ShardError, match="samples of 2 dates; CLIP_benchmark knows one"):
        link_for_clip_benchmark(str(tmp_path / "out"), str(tmp_path / "bench"))


def test_records_of_one_date_keep_the_line_by_which_builds_are_known() -> None:
    record = Record("a", Location("a.png"), "a.png", ("b",), "train")
    at = '{"url":"a.png","offset":null,"size":null,"row":null,"column":null,"window":null}'
    more = '"source":"a.png","captions":["b"],"split":"train","label":null,"meta":{}'
    line = f'{{"image_id":"a","image":{at},{more}}}\n'
    assert record.to_line().decode() == line
    assert Record.from_line(record.to_line()) == record
    pair = Record("a", Location("a.png", window=(1, 2, 3, 4)), "a.png", ("b",), "val", later=(Location("b.png", 3, 5),))
    assert Record.from_line(pair.to_line()) == pair


def test_scenes_of_several_dates_are_cut_into_the_same_tiles(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    for name, shape in (("a", (3, 40, 64)), ("b", (3, 40, 64)), ("c", (3, 40, 50))):
        with rasterio.open(
            tmp_path / f"{name}.tif", "w", driver="GTiff", width=shape[2], height=shape[1], count=3, dtype="uint8",
            crs="EPSG:32633", transform=rasterio.Affine(2, 0, 0, 0, -2, 0),
        ) as file:  # fmt: skip
            file.write(np.random.default_rng(ord(name)).integers(255, size=shape).astype("uint8"))
    entries = [Entry("a.tif", ("x",), later=("b.tif",)), Entry("c.tif", ("y",), later=("b.tif",))]
    records = intake.to_records(entries, str(tmp_path), ReadOptions(), 0)
    cut = list(tiled(records, ImageOptions(geo=True, tile_px=32)))
    tiles = [record for record in cut if isinstance(record, Record)]
    assert len(tiles) == 4
    assert all(len({place.window for place in tile.images}) == 1 for tile in tiles)
    assert [row.detail.split(";")[0] for row in cut if isinstance(row, Rejection)] == [
        "its dates are of different sizes, 50 x 40, 64 x 40"
    ]


# Drawn changes.


def test_a_changed_place_depends_on_its_number_alone_and_classes_take_turns() -> None:
    first, again = change(4), change(4)
    assert (first.label, first.captions) == (again.label, again.captions)
    assert [image.tobytes() for image in first.images] == [image.tobytes() for image in again.images]
    assert change(4, seed=1).images[0].tobytes() != first.images[0].tobytes()
    labels = [change(index, size_px=32).label for index in range(80)]
    assert labels.count(NOTHING) == 10
    assert len(set(labels)) == 31
    assert all(len(change(index, size_px=32).captions) == 5 for index in range(8))


def test_water_appears_where_the_caption_says() -> None:
    checked = 0
    for index in range(3, 100):
        drawn = change(index)
        if drawn.label != "grass to pond":
            continue
        was, now = (np.asarray(image, dtype=int) for image in drawn.images)
        new = (now[..., 2] > now[..., 0] + 25) & ~(was[..., 2] > was[..., 0] + 25)
        y, x = (float(np.median(at)) / 96 for at in new.nonzero())
        assert all(place((x, y)) in caption.lower() for caption in drawn.captions), (index, drawn.captions)
        checked += 1
    assert checked >= 2


def test_synthesize_draws_series_that_say_when(tmp_path: Path) -> None:
    assert main(["synthesize", str(tmp_path / "out"), "--train", "8", "--val", "0", "--test", "0", "--dates", "3",
                 "--size-px", "32", "--shards", "image", "--quiet"]) == 0  # fmt: skip
    found = members_of(tmp_path / "out")
    texts = [data.decode() for name, data in found.items() if name.endswith(".txt")]
    assert sum("between dates" in text for text in texts) == 7
    assert json.loads((tmp_path / "out/manifest.json").read_text())["dates"] == 3
    with pytest.raises(ShardError, match="dates: 13 is not within 1 to 12"):
        synthesize(str(tmp_path / "more"), {"train": 1}, dates=13)
