"""Files made to hang, to fill memory, to lead astray or to crash a reader: refused or rejected by name, in no time."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.hostile_tars import FIRST, GOOD, HOSTILE, member
from helpers.shards_data import karpathy, picture, picture_bytes, shard_bytes, tar_members
from PIL import Image

from msa_openclip.shards import BuildOptions, ImageOptions, ShardError, build, manifest, verify
from msa_openclip.shards.checks.report import report
from msa_openclip.shards.checks.report_page import page
from msa_openclip.shards.clip_benchmark import link_for_clip_benchmark
from msa_openclip.shards.command_line import main
from msa_openclip.shards.imagery import prepare as imagery
from msa_openclip.shards.records import ImageProblem
from msa_openclip.shards.storage import store, tars
from msa_openclip.training.samples import decode

MEMORY = 3 << 30


def command(*arguments: object, seconds: float = 60) -> tuple[int, str]:
    """The exit code and messages of `shards`, which may take so long and so much memory."""
    done = subprocess.run(
        [sys.executable, "-m", "msa_openclip.shards", *map(str, arguments)], capture_output=True, text=True,
        timeout=seconds, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY)),
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def rejections(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]


# Folders.


def test_no_folder_is_entered_twice(tmp_path: Path) -> None:
    root = tmp_path / "in"
    for name in ("lake", "wood"):
        (root / name).mkdir(parents=True)
        picture(len(name)).save(root / name / f"{name}.jpg")
    (root / "lake/up").symlink_to("..")
    (root / "lake/over").symlink_to("../wood")
    (root / "wood/up").symlink_to(root)
    (root / "wood/over").symlink_to("../lake")
    (root / "again").symlink_to("lake")
    (tmp_path / "beside").mkdir()
    picture(3).save(tmp_path / "beside/sea.jpg")
    (root / "sea").symlink_to(tmp_path / "beside")
    (root / "sea2").symlink_to(tmp_path / "beside")
    (root / "dead").symlink_to("nowhere")
    assert store.listing(str(root)) == ["dead", "lake/lake.jpg", "sea/sea.jpg", "wood/wood.jpg"]
    code, _ = command("build", root, tmp_path / "out", "--workers", 1, "--quiet")
    assert code == 0
    assert manifest.read(str(tmp_path / "out"))["splits"]["train"]["images"] == 3


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in/lake").mkdir(parents=True)
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("lake"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="in/lake"):
        store.listing(str(tmp_path / "in"))


# Pipes and devices.


@pytest.mark.parametrize("kind", ["pipe", "device", "link to a device", "huge", "folder"])
def test_an_image_that_is_no_regular_file_is_rejected(tmp_path: Path, kind: str) -> None:
    source = karpathy(tmp_path / "in", {"train": 4})
    victim = tmp_path / "in/images/2.jpg"
    victim.unlink()
    if kind == "pipe":
        os.mkfifo(victim)
    elif kind == "folder":
        victim.mkdir()
    elif kind == "huge":
        victim.touch()
        os.truncate(victim, 100 << 30)
    else:
        victim.symlink_to("/dev/zero")
    options = ["--images", tmp_path / "in/images", "--shards", 1, "--quiet", "--workers", 1]
    code, said = command("build", source, tmp_path / "out", *options)
    assert code == 0, said
    assert [row["file"] for row in rejections(tmp_path / "out")] == ["2.jpg"]


def test_a_table_that_names_a_device_ends(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "1.jpg")
    (tmp_path / "list.csv").write_text("path,caption\n1.jpg,a\n/dev/zero,b\n")
    flags = ["--shards", 1, "--workers", 1, "--quiet", "--outside"]
    code, said = command("build", tmp_path / "list.csv", tmp_path / "out", *flags)
    assert code == 0, said
    assert "not a regular file" in rejections(tmp_path / "out")[0]["detail"]


@pytest.mark.parametrize("name", ["c.json", "c.csv", "c.tar", "c.parquet"])
def test_a_source_that_is_a_pipe_is_refused(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    code, said = command("build", tmp_path / name, tmp_path / "out", "--quiet")
    assert code == 1
    assert f"{tmp_path / name}: not a regular file but a pipe, device or socket" in said


@pytest.mark.parametrize("name", ["data-00000-of-00001.arrow", "state.json"])
def test_a_saved_data_set_with_a_pipe_is_refused(tmp_path: Path, name: str) -> None:
    pytest.importorskip("datasets", reason="datasets (extra hf) is not installed")
    for file in ("dataset_info.json", "state.json"):
        (tmp_path / file).write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-m", "msa_openclip.shards", "build", str(tmp_path), str(tmp_path / "out"), "--quiet"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"{tmp_path / name}: not a regular file but a pipe, device or socket" in done.stderr


@pytest.mark.parametrize("name", ["sizes.json", "manifest.json", "train-000000.tar"])
def test_pipes_among_shards_are_named(tmp_path: Path, name: str) -> None:
    source = karpathy(tmp_path / "in", {"train": 9})
    build(str(source), str(tmp_path / "out"), images=str(tmp_path / "in/images"))
    (tmp_path / "out" / name).unlink()
    os.mkfifo(tmp_path / "out" / name)
    done = subprocess.run(
        [sys.executable, "-m", "msa_openclip.shards", "verify", str(tmp_path / "out"), "--quiet", "--workers", "1"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert name in done.stdout + done.stderr
    assert "not a regular file" in done.stdout + done.stderr


# Tars.


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("on_disk", ["short", "long"])
def test_hostile_tars_end_with_a_rejection(tmp_path: Path, what: str, on_disk: str) -> None:
    """Long: holes after its end make the file as large as it claims, though it takes no room."""
    path = tmp_path / "train-000000.tar"
    path.write_bytes(GOOD + HOSTILE[what])
    if on_disk == "long":
        os.truncate(path, 61 << 30)
    code, said = command("build", path, tmp_path / "out", "--workers", 1, "--quiet", "--shards", 1)
    assert code == 0, said
    names = [name for name, _ in tar_members(tmp_path / "out/train-000000.tar")]
    assert "0.jpg" in names
    rejected = [row["reason"] for row in rejections(tmp_path / "out")]
    assert rejected == ["damaged tar"] or (on_disk == "long" and what in ("cut", "gigabytes", "no end"))
    code, said = command("info", path)
    assert code == 1 or rejected != ["damaged tar"]
    assert code == 0 or f"{path}: damaged: " in said


def test_a_tar_that_is_hostile_from_the_start(tmp_path: Path) -> None:
    path = tmp_path / "train-000000.tar"
    path.write_bytes(HOSTILE["negative size"] + GOOD)
    code, said = command("build", path, tmp_path / "out", "--workers", 1, "--quiet")
    assert code == 1
    assert f"{path}: nothing is left to build (damaged tar: 1)" in said


def test_many_members_of_one_name_are_read_in_linear_time(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"".join(member(f"0.{number}", b"") for number in range(30_000)) + bytes(1024))
    with path.open("rb") as file:
        assert [len(group) for _, group in tars.samples(file)] == [30_000]


def tar_of(path: Path, **json_fields: Any) -> Path:
    """A tar with one good sample and one with this JSON."""
    metadata = json.dumps(json_fields).encode()
    parts = FIRST + member("1.jpg", picture_bytes(1)) + member("1.txt", b"b") + member("1.json", metadata)
    path.write_bytes(parts + bytes(1024))
    return path


@pytest.mark.parametrize(
    ("fields", "image_id"),
    [
        ({"image_id": 7, "sha256": "x"}, "7"),
        ({"image_id": None}, "1"),
        ({"image_id": ["a"]}, None),
        ({"image_id": "a\ud800"}, None),
        ({"split": 3}, None),
        ({"split": ["train"]}, None),
        ({"class": 3}, "1"),
        ({"class": {}}, None),
        ({"captions": [3]}, "1"),  # those of 1.txt count
        ({"source": 3}, "1"),
        ({"image_id": "x", "sha256": "x", "caption_index": "0"}, None),
        ({"image_id": "x", "sha256": "x", "meta": "\udc00"}, None),
        ({"caption_index": "0"}, "1"),
    ],
)
def test_json_of_a_sample_in_other_types(tmp_path: Path, fields: dict[str, Any], image_id: str | None) -> None:
    path = tar_of(tmp_path / "a.tar", **fields)
    build(str(path), str(tmp_path / "out"), options=BuildOptions(shards=1))
    data = [json.loads(d) for n, d in tar_members(tmp_path / "out/train-000000.tar") if n.endswith(".json")]
    assert {row["image_id"] for row in data} == {"0"} | ({image_id} if image_id else set())
    assert len(rejections(tmp_path / "out")) == (image_id is None)
    assert verify(str(tmp_path / "out"), decode=True).ok


@pytest.mark.parametrize("fields", [{"class": ["a"]}, {"class": {"a": 1}}, {"sha256": ["x"]}, {"width": [3]}])
def test_info_names_the_place_of_other_types(tmp_path: Path, fields: dict[str, Any]) -> None:
    path, name = tar_of(tmp_path / "a.tar", **fields), next(iter(fields))
    with pytest.raises(ShardError, match=rf"a.tar: damaged: 1.json: {name}: .* where text is expected"):
        report([str(path)])


@pytest.mark.parametrize("fields", [{"width": 24}, {"class": 5}, {"class": True}, {"width": 0, "height": None}])
def test_info_takes_what_is_unusual(tmp_path: Path, fields: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib (extra plot) is not installed")
    (tmp_path / "in").mkdir()
    tar_of(tmp_path / "in/a.tar", **fields)
    tar_of(tmp_path / "in/b.tar", image_id="other", **{"class": "x"})
    made = report([str(tmp_path / "in")])
    [row] = made.content["splits"].values()
    assert row["sizes"] == {}
    assert set(row["classes"]) == {"x", *(str(fields[name]) for name in fields if name == "class")}
    assert "<h2>Images by class</h2>" in page(made)


def test_info_refuses_tars_without_samples(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(1024))
    with pytest.raises(ShardError, match=r"a.tar: no sample in its shards"):
        report([str(tmp_path / "a.tar")])


def test_info_names_the_image_that_has_no_looks(tmp_path: Path) -> None:
    pytest.importorskip("imagehash", reason="imagehash (extra report) is not installed")
    (tmp_path / "a.tar").write_bytes(FIRST + member("1.jpg", b"broken") + member("1.txt", b"b") + bytes(1024))
    with pytest.raises(ShardError, match=r"a.tar:1: its image cannot be decoded .* Leave out --look-alikes"):
        report([str(tmp_path / "a.tar")], near_bits=2)


@pytest.mark.parametrize("text", [b"{", b"[" * 100_000, b"[1]", b"\xff", b'{"a": 1, "a": 2}', b'"text"'])
def test_json_of_a_sample_that_is_none(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(FIRST + member("1.jpg", picture_bytes(1)) + member("1.json", text) + bytes(1024))
    build(str(path), str(tmp_path / "out"))
    assert [row["reason"] for row in rejections(tmp_path / "out")] == ["damaged sample"]
    with pytest.raises(ShardError, match=r"a.tar: damaged: 1.json: not"):
        report([str(path)])


def test_captions_of_a_tar_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(FIRST + member("1.jpg", picture_bytes(1)) + member("1.txt", b"caf\xe9") + bytes(1024))
    build(str(path), str(tmp_path / "out"))
    assert "1.txt: not UTF-8" in rejections(tmp_path / "out")[0]["detail"]


def test_pairs_with_one_number_are_not_merged_in_silence(tmp_path: Path) -> None:
    source = karpathy(tmp_path / "in", {"train": 4}, captions=2)
    images = str(source.parent / "images")
    build(str(source), str(tmp_path / "x"), images=images, options=BuildOptions(layout="pair", shards=1))
    (tmp_path / "z").mkdir()
    (tmp_path / "z/x").symlink_to(tmp_path / "x")
    summary = build(f"{tmp_path}/x::{tmp_path}/z/x", str(tmp_path / "out"), options=BuildOptions(shards=1))
    assert summary.rejected == {"duplicate key": 8}


# Images.


def test_whatever_a_decoder_raises_rejects_that_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = karpathy(tmp_path / "in", {"train": 4})
    opened, seen = Image.open, []

    def fragile(file: Any, **arguments: Any) -> Any:
        seen.append(file)
        if len(seen) == 2:
            raise TypeError("unsupported operand")
        if len(seen) == 3:
            raise RecursionError
        return opened(file, **arguments)

    monkeypatch.setattr(Image, "open", fragile)
    summary = build(str(source), str(tmp_path / "out"), images=str(tmp_path / "in/images"),
                    options=BuildOptions(shards=1))  # fmt: skip
    assert summary.rejected == {"unreadable image": 2}
    assert [row["detail"] for row in rejections(tmp_path / "out")] == [
        "cannot be decoded: unsupported operand", "cannot be decoded: RecursionError",
    ]  # fmt: skip


def test_no_program_is_run_for_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow hands EPS, by whichever name, to Ghostscript."""
    out = io.BytesIO()
    picture(1).save(out, "EPS")
    source = karpathy(tmp_path / "in", {"train": 4})
    (tmp_path / "in/images/2.jpg").write_bytes(out.getvalue())
    monkeypatch.setattr(subprocess, "check_call", lambda *_: pytest.fail("a program was run"))
    monkeypatch.setattr(subprocess, "Popen", lambda *_: pytest.fail("a program was run"))
    for options in (ImageOptions(), ImageOptions(resize_px=8), ImageOptions(check="decode")):
        with pytest.raises(ImageProblem, match="not an image that Pillow reads"):
            imagery.prepare(out.getvalue(), options)
    with pytest.raises(OSError, match="cannot identify image file"):
        decode(out.getvalue())
    monkeypatch.undo()
    summary = build(str(source), str(tmp_path / "out"), images=str(tmp_path / "in/images"))
    assert summary.rejected == {"unreadable image": 1}


def float_tiff(values: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(values.astype(np.float32), "F").save(out, "TIFF")
    return out.getvalue()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Image.fromarray's mode
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_no_numbers_are_black_and_the_others_as_ever(odd: float) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    whole = Image.open(io.BytesIO(imagery.prepare(float_tiff(values), ImageOptions()).data))
    values[1, 2] = odd
    found = np.asarray(Image.open(io.BytesIO(imagery.prepare(float_tiff(values), ImageOptions()).data)))
    expected = np.asarray(whole).copy()
    expected[1, 2] = 0
    assert (found == expected).all()
    with pytest.raises(ImageProblem, match="no pixel is a finite number"):
        imagery.prepare(float_tiff(np.full((2, 2), odd)), ImageOptions())


# Manifests.


def edited(folder: Path, edit: Callable[[Any], Any]) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(edit(content)))


def set_at(*path: Any, value: Any) -> Callable[[Any], Any]:
    def edit(content: Any) -> Any:
        at = content
        for key in path[:-1]:
            at = at[key]
        if value is KeyError:
            del at[path[-1]]
        else:
            at[path[-1]] = value
        return content

    return edit


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("shards",), KeyError, "shards: missing where a list is expected"),
        (("shards",), {}, "shards: {} where a list is expected"),
        (("shards", 1), 3, "shards[1]: int where an object is expected"),
        (("shards", 0, "file"), "../x.tar", "shards[0].file: '../x.tar' is no name of a shard"),
        (("shards", 0, "file"), "/etc/x-000000.tar", "is no name of a shard"),
        (("shards", 0, "file"), "train-000001.tar", "shards[1].file: 'train-000001.tar' is there twice"),
        (("shards", 0, "samples"), -1, "shards[0].samples: -1 where a number is expected"),
        (("shards", 0, "samples"), True, "shards[0].samples: True where a number is expected"),
        (("shards", 0, "size_bytes"), "1", "shards[0].size_bytes: '1' where a number is expected"),
        (("shards", 0, "sums"), "xyz", "shards[0].sums: not a checksum for each of"),
        (("shards", 0, "sums"), "", "shards[0].sums: not a checksum for each of"),
        (("shards", 0, "split"), "../../x", "shards[0].split: '../../x' is not among the splits"),
        (("splits", "../../x"), {}, "splits: '../../x' is not one of train, val, test"),
        (("splits", "train"), None, "splits.train: NoneType where an object is expected"),
        (("splits", "train", "pattern"), KeyError, "splits.train.pattern: missing where text is expected"),
        (("options",), [], "options: [] where an object is expected"),
        (("rejected",), {"x": "y"}, "rejected.x: 'y' where a number is expected"),
        (("layout",), 1, "layout: 1 where text is expected"),
        (("fingerprint",), None, "fingerprint: None where text is expected"),
    ],
)
def test_a_damaged_manifest_is_named_by_every_command(
    tmp_path: Path, path: tuple[Any, ...], value: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = karpathy(tmp_path / "in", {"train": 9})
    options = BuildOptions(shards=2)
    build(str(source), str(tmp_path / "out"), images=str(tmp_path / "in/images"), options=options)
    edited(tmp_path / "out", set_at(*path, value=value))
    again = ["build", str(source), str(tmp_path / "out"), "--images", str(tmp_path / "in/images"), "--shards", "2"]
    for arguments in (
        ["verify", str(tmp_path / "out")],
        [*again, "--workers", "1"],
        ["clip-benchmark", str(tmp_path / "out"), str(tmp_path / "b")],
        ["info", str(tmp_path / "out")],
    ):
        assert main(arguments) == 1
        said = capsys.readouterr().err
        assert f"{tmp_path}/out/manifest.json: damaged: " in said
        assert message in said
    assert not (tmp_path / "b").exists()
    assert main([*again, "--workers", "1", "--overwrite", "--quiet"]) == 0
    assert verify(str(tmp_path / "out")).ok


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[]", "null", '{"format": 1, "format": 1}'])
def test_a_manifest_that_is_none(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "manifest.json").write_text(text)
    assert main(["verify", str(tmp_path)]) == 1
    assert f"error: {tmp_path}/manifest.json: not " in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000, '{"train-000000.tar": "9"}'])
def test_verify_names_a_damaged_sizes_json(tmp_path: Path, text: str) -> None:
    source = karpathy(tmp_path / "in", {"train": 9})
    build(str(source), str(tmp_path / "out"), images=str(tmp_path / "in/images"), options=BuildOptions(shards=1))
    (tmp_path / "out/sizes.json").write_text(text)
    assert [problem.file for problem in verify(str(tmp_path / "out")).problems] == ["sizes.json"]


def test_clip_benchmark_links_whole_builds_only_into_its_folder(tmp_path: Path) -> None:
    source = karpathy(tmp_path / "in", {"train": 9})
    build(str(source), str(tmp_path / "out"), images=str(tmp_path / "in/images"), options=BuildOptions(shards=1))
    before = shard_bytes(tmp_path / "out")
    link_for_clip_benchmark(str(tmp_path / "out"), str(tmp_path / "bench/set"))
    assert shard_bytes(tmp_path / "out") == before
