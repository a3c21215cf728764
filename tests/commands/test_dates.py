"""Commands on samples of other dates than the model takes: refused in one line that names sample, numbers and key."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import open_clip
import pytest
import torch
from helpers import tiny
from helpers.retrieval_data import randomise, scene
from helpers.stream_data import tar_bytes

from msa_openclip.commands import main as cli
from msa_openclip.shards.command_line import main as shards


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Tiny models by their dates, as `NAME=FILE`."""
    folder, specs = tmp_path_factory.mktemp("models"), {}
    for dates in (1, 2):
        tiny.write_config(folder, f"MSA-tiny-{dates}", tiny.config(msa={"dates": dates}))
        open_clip.add_model_config(folder)
        torch.save(randomise(open_clip.create_model(f"MSA-tiny-{dates}")).state_dict(), folder / f"{dates}.pt")
        specs[dates] = f"MSA-tiny-{dates}={folder}/{dates}.pt"
    return specs


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Shards of drawn places by their dates."""
    found = {}
    for dates in (1, 2, 3):
        folder = tmp_path_factory.mktemp("places")
        counts = ["--train", "0", "--val", "0", "--test", "4", "--size-px", "32", "--shards", "image"]
        assert shards(["synthesize", str(folder), *counts, "--dates", str(dates), "--quiet"]) in (0, None)
        found[dates] = f"{folder}/test-000000.tar"
    return found


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The line with which a command refuses; behind wrong arguments stands where its help is."""
    capsys.readouterr()
    assert cli.main(list(map(str, arguments))) in (1, 2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    return line


@pytest.mark.parametrize(("takes", "there"), [(1, 2), (2, 1), (2, 3)])
@pytest.mark.parametrize("command", ["eval", "index", "classify"])
def test_other_dates_are_refused_before_an_image_is_read(
    command: str, takes: int, there: int, models: dict[int, str], places: dict[int, str], tmp_path: Path, capsys
) -> None:
    after = [tmp_path / "places.index"] if command == "index" else []
    line = refusal(capsys, command, models[takes], *after, "--shards", places[there], "--workers", "0")
    count = f"{there} date{'s' if there > 1 else ''}"
    assert ".tar: image images/test_00000" in line
    assert f"{count}, where the model takes {takes} (msa_cfg.dates). Choose data of as many dates" in line
    assert not (tmp_path / "places.index").exists()


def test_folders_of_single_images_are_refused_by_a_model_of_pairs(models, tmp_path: Path, capsys) -> None:
    (tmp_path / "tiles").mkdir()
    scene(1).save(tmp_path / "tiles/a.png")
    line = refusal(capsys, "index", models[2], tmp_path / "places.index", "--folder", tmp_path / "tiles")
    assert "a.png: 1 date, where the model takes 2" in line


def without(shard: str, extension: str, target: Path) -> str:
    """A shard without the first of its members with an extension."""
    with tarfile.open(shard) as tar, tarfile.open(target, "w") as rest:
        members = tar.getmembers()
        members.remove(next(member for member in members if member.name.endswith(extension)))
        for member in members:
            rest.addfile(member, tar.extractfile(member))
    return str(target)


@pytest.mark.parametrize("dates", [2, 3])
def test_a_missing_date_is_named(dates: int, models, places, tmp_path: Path, capsys) -> None:
    """The second image, of two the last, of three one between others that are there."""
    cut = without(places[dates], ".1.jpg", tmp_path / "a.tar")
    line = refusal(capsys, "eval", models[2], "--shards", cut, "--workers", "0")
    expected = "1 images, its JSON says" if dates == 2 else "0.jpg, 2.jpg, json, txt; the image of date 1 is missing"
    assert expected in line


def test_a_missing_date_is_named_where_shards_are_built_of_shards(places, tmp_path: Path) -> None:
    without(places[3], ".1.jpg", tmp_path / "a.tar")
    assert shards(["build", str(tmp_path / "a.tar"), str(tmp_path / "out"), "--quiet"]) in (0, None)
    (row,) = map(json.loads, (tmp_path / "out/rejected.jsonl").read_text().splitlines())
    assert (row["reason"], row["detail"]) == ("missing image", "of date 1; members are 0.jpg, 2.jpg, json, txt")


def test_dates_of_other_sizes_are_named(models, tmp_path: Path, capsys) -> None:
    for name, size in (("a.png", 24), ("b.png", 30)):
        scene(1, size).save(tmp_path / name)
    members = [(f"k.{date}.png", (tmp_path / name).read_bytes()) for date, name in enumerate(("a.png", "b.png"))]
    (tmp_path / "k.tar").write_bytes(tar_bytes([*members, ("k.txt", b"houses appeared")]))
    line = refusal(capsys, "eval", models[2], "--shards", tmp_path / "k.tar", "--workers", "0")
    assert "its dates are of different sizes, 24 x 24, 30 x 30; --resize-px N --resize-mode squash makes one" in line
    line = refusal(capsys, "explain", models[2], tmp_path / "a.png", tmp_path / "b.png", "houses appeared")
    assert "its dates are of different sizes, 24 x 24, 30 x 30" in line
    line = refusal(capsys, "explain", models[2], tmp_path / "a.png", "houses appeared")
    assert "1 images, the model takes 2 (msa_cfg.dates)" in line


def test_searches_by_images_take_one_of_each_date(models, places, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "places.index"
    assert cli.main(["index", models[2], str(folder), "--shards", places[2], "--workers", "0"]) == 0
    scene(1).save(tmp_path / "a.png")
    scene(1, 30).save(tmp_path / "b.png")
    like = ("search", folder, "--model", models[2], "--like", tmp_path / "a.png")
    assert "1 files, where the index has samples of 2 dates; name one of each" in refusal(capsys, *like)
    assert "its dates are of different sizes, 24 x 24, 30 x 30" in refusal(capsys, *like, tmp_path / "b.png")
