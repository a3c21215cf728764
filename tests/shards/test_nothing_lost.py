"""What lies in a folder is lost to no build: sources, users' files, another builder's shards, images that changed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.shards_data import karpathy, picture_bytes, shard_bytes, tar_members

from msa_openclip.shards import BuildOptions, ImageOptions, ShardError, build, verify
from msa_openclip.shards.building.folder import BuildFolder
from msa_openclip.shards.building.writer import ShardResult
from msa_openclip.shards.command_line import main
from msa_openclip.shards.storage import store
from msa_openclip.shards.storage.locking import LOCK, BeingWritten, one_writer

OPTIONS = BuildOptions(shards=4)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return karpathy(tmp_path / "in", {"train": 40}, captions=2)


def run_build(source: Path, out: Path, **arguments: Any) -> Any:
    options = arguments.pop("options", OPTIONS)
    return build(str(source), str(out), images=str(source.parent / "images"), options=options, **arguments)


# Source and target.


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("target", ["x", "x/", "./x/../x", "link", "x/inner", ".", "linked/x", "file://x"])
def test_shards_are_not_resharded_onto_themselves(
    tmp_path: Path, source: Path, target: str, overwrite: bool, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run_build(source, tmp_path / "x")
    before = shard_bytes(tmp_path / "x")
    (tmp_path / "link").symlink_to("x")
    (tmp_path / "linked").symlink_to(".")
    monkeypatch.chdir(tmp_path)
    flags = ["--overwrite"] if overwrite else []
    assert main(["reshard", "x", target, "--shards", "2", "--workers", "1", "--quiet", *flags]) == 1
    assert "one lies inside the other" in capsys.readouterr().err
    assert shard_bytes(tmp_path / "x") == before


@pytest.mark.parametrize("form", ["{x}/train-{{000000..000003}}.tar", "{y}::{x}", "{x}/train-000001.tar", "{links}"])
def test_no_tar_of_the_target_is_a_source(tmp_path: Path, source: Path, form: str) -> None:
    run_build(source, tmp_path / "x")
    run_build(source, tmp_path / "y", options=BuildOptions(shards=2, seed=1))
    (tmp_path / "links").mkdir()
    for path in (tmp_path / "x").glob("*.tar"):
        (tmp_path / "links" / path.name).symlink_to(path)
    before = shard_bytes(tmp_path / "x")
    pattern = form.format(x=tmp_path / "x", y=tmp_path / "y", links=tmp_path / "links")
    with pytest.raises(ShardError, match="the source would be overwritten"):
        build(pattern, str(tmp_path / "x"), overwrite=True)
    assert shard_bytes(tmp_path / "x") == before


def test_tars_beside_the_target_may_be_its_source(tmp_path: Path, source: Path) -> None:
    run_build(source, tmp_path / "x")
    build(f"{tmp_path}/x/train-{{000000..000003}}.tar", str(tmp_path / "x/new"), options=OPTIONS)
    assert shard_bytes(tmp_path / "x/new") == shard_bytes(tmp_path / "x")


@pytest.mark.parametrize("name", ["manifest.json", "report.json"])
def test_captions_that_the_build_would_overwrite_are_refused(tmp_path: Path, source: Path, name: str) -> None:
    captions = source.rename(source.with_name(name))
    before = captions.read_bytes()
    with pytest.raises(ShardError, match="the source would be overwritten"):
        run_build(captions, captions.parent, overwrite=True)
    assert captions.read_bytes() == before


@pytest.mark.parametrize("name", ["report.json", "report.html"])
def test_a_report_replaces_reports_only(
    name: str, tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib (extra plot) is not installed")
    report = tmp_path / "out" / name
    report.parent.mkdir()
    report.write_text("{}")
    arguments = ["build", str(source), str(tmp_path / "out"), "--images", str(source.parent / "images"), "--report",
                 "--workers", "1", "--quiet"]  # fmt: skip
    assert main(arguments) == 1
    assert f"{report}: is no report of shards, and --report would overwrite it" in capsys.readouterr().err
    assert [path.name for path in report.parent.iterdir()] == [name]
    report.unlink()
    assert [main(arguments), main(arguments)] == [0, 0]
    assert report.stat().st_size > 100


def test_an_unfinished_build_is_no_source(tmp_path: Path, source: Path) -> None:
    interrupted_build(source, tmp_path / "x")
    with pytest.raises(ShardError, match=r"x: its build is unfinished"):
        build(str(tmp_path / "x"), str(tmp_path / "y"))


# Users' files.


def interrupted_build(source: Path, out: Path, options: BuildOptions = OPTIONS) -> None:
    """A build that a broken image has ended after some shards; the image is whole again."""
    victim = source.parent / "images/17.jpg"
    data, times = victim.read_bytes(), victim.stat()
    kept = victim.rename(victim.with_suffix(".kept"))
    victim.write_bytes(b"broken")
    with pytest.raises(ShardError, match="not an image"):
        run_build(source, out, strict=True, options=options)
    victim.unlink()
    kept.rename(victim)
    assert (victim.read_bytes(), victim.stat().st_mtime_ns) == (data, times.st_mtime_ns)
    assert shard_bytes(out)


def test_only_the_builders_own_half_written_files_are_removed(tmp_path: Path, source: Path) -> None:
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    elsewhere.mkdir()
    interrupted_build(source, out)
    (out / "link").symlink_to(elsewhere)
    (out / "sub").mkdir()
    theirs = [out / "notes.tmp", out / "sub/draft.tmp", elsewhere / "thesis.tmp", out / ".mine.0123abcd.tmp",
              elsewhere / ".train-000000.tar.0123abcd.tmp", out / ".build/plan.tmp"]  # fmt: skip
    ours = [out / ".train-000000.tar.0123abcd.tmp", out / ".build/.train-000000.tar.json.0123abcd.tmp"]
    for path in (*theirs, *ours):
        path.write_text("text")
    run_build(source, out)
    assert [path.name for path in theirs if not path.exists()] == []
    assert [path.name for path in ours if path.exists()] == []
    assert verify(str(out)).ok


def test_sigterm_leaves_users_files_alone(tmp_path: Path) -> None:
    source = karpathy(tmp_path / "in", {"train": 240}, suffix="tif")
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.tmp").write_text("text")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tmp").write_text("text")
    (out / "link").symlink_to(tmp_path / "other")
    command = [sys.executable, "-m", "msa_openclip.shards", "build", str(source), str(out), "--images",
               str(source.parent / "images"), "--shards", "16", "--resize-px", "200", "--resize-mode", "squash",
               "--workers", "1", "--quiet"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.tar"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert (out / "notes.tmp").exists()
    assert (tmp_path / "other/thesis.tmp").exists()
    assert not list(out.glob(".*.tmp"))


def test_overwriting_removes_earlier_builds_and_nothing_else(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    run_build(source, out, options=BuildOptions(shards=3, name="old"))
    theirs = [out / "readme.txt", out / "photos.tar", out / ".build/debug.log"]
    (out / ".build").mkdir()
    for path in theirs:
        path.write_text("text")
    run_build(source, out, overwrite=True)
    assert [path.name for path in theirs if not path.exists()] == []
    assert sorted(shard_bytes(out)) == ["photos.tar", *(f"train-{number:06d}.tar" for number in range(4))]


@pytest.mark.parametrize("name", ["train-000000.tar", "train-000099.tar", "test-000000.tar", "sizes.json"])
@pytest.mark.parametrize("built", [False, True])
def test_shards_that_no_build_made_are_not_overwritten(name: str, built: bool, tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if built:
        run_build(source, out)
    if (out / name).exists():
        return  # of the build, and listed
    (out / name).write_bytes(b"mine")
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ShardError, match=rf"{name}: stands where this build would write.* It is left alone: move it"):
        run_build(source, out, overwrite=True, options=BuildOptions(shards=2))
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    (out / name).unlink()
    run_build(source, out, overwrite=True, options=BuildOptions(shards=2))
    assert verify(str(out)).ok


@pytest.mark.parametrize("damaged", [False, True])
def test_overwriting_keeps_tars_that_only_sizes_json_lists(damaged: bool, tmp_path: Path, source: Path) -> None:
    """A list of sizes may name shards of the user's own, for open_clip to read."""
    out = tmp_path / "out"
    run_build(source, out)
    for name in ("extra-000000.tar", "mine-train-000000.tar"):
        (out / name).write_bytes(b"mine")
    sizes = json.loads((out / "sizes.json").read_text()) | {"extra-000000.tar": 3, "mine-train-000000.tar": 3}
    (out / "sizes.json").write_text(json.dumps(sizes))
    if damaged:
        content = json.loads((out / "manifest.json").read_text())
        (out / "manifest.json").write_text(json.dumps(content | {"shards": [*content["shards"][:1], None]}))
    run_build(source, out, overwrite=True, options=BuildOptions(shards=2))
    kept = ["extra-000000.tar", "mine-train-000000.tar"]
    assert sorted(shard_bytes(out)) == [*kept, "train-000000.tar", "train-000001.tar"]


@pytest.mark.parametrize("note", ["whole", "damaged"])
def test_an_unfinished_build_of_another_name_owns_no_shards_of_this_one(
    note: str, tmp_path: Path, source: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "train-000000.tar").write_bytes(b"mine")
    interrupted_build(source, out, options=BuildOptions(shards=4, name="a"))
    if note == "damaged":
        (out / ".build/state.json").write_bytes(b"{")
    (out / "state").write_text("mine")
    before = shard_bytes(out)
    with pytest.raises(ShardError, match=r"train-000000.tar: stands where this build would write.* It is left alone"):
        run_build(source, out, overwrite=True)
    assert shard_bytes(out) == before
    (out / "train-000000.tar").unlink()
    run_build(source, out, overwrite=True)
    assert sorted(shard_bytes(out)) == [f"train-{number:06d}.tar" for number in range(4)]
    assert (out / "state").exists()
    assert not (out / ".build").exists()


@pytest.mark.parametrize("stop", [1, 4, 6])
def test_overwriting_goes_on_after_a_kill_in_the_middle(stop: int, tmp_path: Path, source: Path, monkeypatch) -> None:
    """Whatever has been removed by then, the rest is still known to be a build's."""
    out, remove, removed = tmp_path / "out", store.remove, list[str]()

    def remove_some(url: str) -> None:
        if url.startswith(str(out)) and len(removed) == stop:
            raise KeyboardInterrupt
        removed.append(url)
        remove(url)

    run_build(source, out)
    monkeypatch.setattr(store, "remove", remove_some)
    with pytest.raises(KeyboardInterrupt):
        run_build(source, out, overwrite=True)
    monkeypatch.setattr(store, "remove", remove)
    run_build(source, out, overwrite=True)
    assert verify(str(out)).ok


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_manifest_of_another_program_is_left_alone(tmp_path: Path, source: Path, overwrite: bool) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/manifest.json").write_text('{"name": "my browser extension"}')
    with pytest.raises(ShardError, match="not a manifest of format 1"):
        run_build(source, tmp_path / "out", overwrite=overwrite)
    assert "extension" in (tmp_path / "out/manifest.json").read_text()


def test_a_linked_folder_of_notes_is_refused(tmp_path: Path, source: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/state.json").write_text("{}")
    (tmp_path / "out/.build").symlink_to(tmp_path / "mine")
    with pytest.raises(ShardError, match=r"\.build: a link"):
        run_build(source, tmp_path / "out", overwrite=True)
    assert (tmp_path / "mine/state.json").exists()


# Two builders.


def test_two_builders_of_one_folder(tmp_path: Path, source: Path) -> None:
    command = [sys.executable, "-m", "msa_openclip.shards", "build", str(source), str(tmp_path / "out"), "--images",
               str(source.parent / "images"), "--shards", "4", "--workers", "1", "--quiet"]  # fmt: skip
    builders = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    ends = [(builder.communicate()[1], builder.returncode) for builder in builders]
    assert 0 in [code for _, code in ends]
    for said, code in ends:
        assert code == 0 or "is writing here" in said
    run_build(source, tmp_path / "alone")
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "alone")
    assert verify(str(tmp_path / "out")).ok
    assert not (tmp_path / "out" / LOCK).exists()


def test_a_builder_leaves_a_folder_alone_while_another_writes(tmp_path: Path, source: Path) -> None:
    interrupted_build(source, tmp_path / "out")
    half = tmp_path / "out/.train-000003.tar.0123abcd.tmp"
    half.write_text("the other's")
    before = shard_bytes(tmp_path / "out")
    with one_writer(str(tmp_path / "out")), pytest.raises(BeingWritten):
        run_build(source, tmp_path / "out", overwrite=True)
    assert half.exists()
    assert shard_bytes(tmp_path / "out") == before
    run_build(source, tmp_path / "out")


def test_a_finished_build_may_lie_where_nobody_can_write(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_build(source, tmp_path / "out")

    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(store, "make_folder", refuse)
    assert run_build(source, tmp_path / "out").resumed_shards == 4


# Images that change while a build waits to go on.


@pytest.mark.parametrize("how", ["rewritten", "swapped with time and size kept"])
def test_images_replaced_before_a_build_goes_on_are_read_again(tmp_path: Path, source: Path, how: str) -> None:
    out = tmp_path / "out"
    interrupted_build(source, out)
    shard = sorted(shard_bytes(out))[0]
    name = next(name for name, _ in tar_members(out / shard) if name.endswith(".jpg"))
    victim = source.parent / "images" / name
    before = victim.stat()
    if how == "rewritten":
        victim.write_bytes(picture_bytes(1234))
    else:
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        other = victim.with_suffix(".new")
        other.write_bytes(data)
        os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
        other.rename(victim)
    run_build(source, out)
    run_build(source, tmp_path / "whole")
    assert shard_bytes(out) == shard_bytes(tmp_path / "whole")
    assert (out / "manifest.json").read_bytes() == (tmp_path / "whole/manifest.json").read_bytes()


def image_names(folder: Path) -> list[list[str]]:
    """The images of each shard of a folder, in their order."""
    return [[n for n, _ in tar_members(path) if n.endswith(".jpg")] for path in sorted(folder.glob("*.tar"))]


def test_a_repaired_image_is_taken_in_when_a_build_goes_on(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_build(source, tmp_path / "whole")
    early = source.parent / "images" / image_names(tmp_path / "whole")[0][1]
    data = early.read_bytes()
    early.write_bytes(b"broken")
    noted = BuildFolder.note

    def end_after_one(folder: BuildFolder, result: ShardResult) -> None:
        noted(folder, result)
        raise KeyboardInterrupt

    monkeypatch.setattr(BuildFolder, "note", end_after_one)
    with pytest.raises(KeyboardInterrupt):
        run_build(source, tmp_path / "out")
    monkeypatch.undo()
    early.write_bytes(data)
    assert run_build(source, tmp_path / "out").rejected == {}
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "whole")


def test_images_replaced_in_a_tar_are_read_again(tmp_path: Path, source: Path) -> None:
    run_build(source, tmp_path / "x", options=BuildOptions(shards=1))
    build(str(tmp_path / "x"), str(tmp_path / "first"), options=OPTIONS)
    names, tar = image_names(tmp_path / "first"), tmp_path / "x/train-000000.tar"
    members, data = dict(tar_members(tar)), bytearray(tar.read_bytes())
    late = data.index(members[names[-1][1]])
    kept = data[late : late + 2]
    data[late : late + 2] = b"no"
    tar.write_bytes(data)
    with pytest.raises(ShardError, match="not an image"):
        build(str(tmp_path / "x"), str(tmp_path / "y"), options=OPTIONS, strict=True)
    assert shard_bytes(tmp_path / "y")
    data[late : late + 2] = kept
    early = data.index(members[names[0][1]]) + len(members[names[0][1]]) // 2
    data[early] ^= 1
    tar.write_bytes(data)
    build(str(tmp_path / "x"), str(tmp_path / "y"), options=OPTIONS)
    build(str(tmp_path / "x"), str(tmp_path / "whole"), options=OPTIONS)
    assert shard_bytes(tmp_path / "y") == shard_bytes(tmp_path / "whole")
    assert shard_bytes(tmp_path / "y") != shard_bytes(tmp_path / "first")


def test_images_changed_after_a_build_are_noted(tmp_path: Path, source: Path) -> None:
    run_build(source, tmp_path / "out")
    assert "were changed" not in run_build(source, tmp_path / "out").text()
    (source.parent / "images/5.jpg").write_bytes(picture_bytes(99))
    os.utime(source.parent / "images/5.jpg", ns=(time.time_ns() + 10**9,) * 2)
    assert "1 image files were changed after this build, e.g. " in run_build(source, tmp_path / "out").text()


def test_scenes_do_not_replace_captions_of_yours(tmp_path: Path) -> None:
    arguments = ["synthesize", str(tmp_path), "--train", "2", "--val", "0", "--test", "0"]
    assert [main(arguments), main(arguments)] == [0, 0]
    (tmp_path / "captions.json").write_text('{"images": []}')
    assert main(arguments) == 1
    assert (tmp_path / "captions.json").read_text() == '{"images": []}'


@pytest.mark.parametrize("damage", [b"", b"{", b'{"file": 3}', b"[" * 100_000, b"null"])
def test_a_damaged_note_costs_its_shard_only(tmp_path: Path, source: Path, damage: bytes) -> None:
    out = tmp_path / "out"
    interrupted_build(source, out)
    note = sorted((out / ".build").glob("train*.json"))[0]
    note.write_bytes(damage)
    finished = len(shard_bytes(out))
    assert run_build(source, out).resumed_shards == finished - 1
    assert verify(str(out)).ok


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"options": 3}', b"[" * 100_000])
def test_damaged_notes_of_a_build_are_named(tmp_path: Path, source: Path, damage: bytes) -> None:
    interrupted_build(source, tmp_path / "out")
    (tmp_path / "out/.build/state.json").write_bytes(damage)
    with pytest.raises(ShardError, match=r"state.json: damaged; pass --overwrite"):
        run_build(source, tmp_path / "out")
    run_build(source, tmp_path / "out", overwrite=True)
    assert verify(str(tmp_path / "out")).ok


# Durable writes.


def test_a_file_is_on_the_disk_before_its_name_and_its_name_before_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        steps.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def noted_replace(source: str, target: str) -> None:
        steps.append(f"rename to {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    store.make_folder(str(tmp_path / "a/b"))
    assert steps == ["fsync a", f"fsync {tmp_path.name}"]
    steps.clear()
    store.write_bytes(str(tmp_path / "a/b/file"), b"content")
    assert [step.split(".")[0] for step in steps] == ["fsync ", "rename to file", "fsync b"]


def test_resized_images_too_depend_on_their_sources_only(tmp_path: Path, source: Path) -> None:
    options = BuildOptions(shards=2, image=ImageOptions(resize_px=8))
    run_build(source, tmp_path / "a", options=options, workers=2)
    run_build(source, tmp_path / "b", options=options)
    assert shard_bytes(tmp_path / "a") == shard_bytes(tmp_path / "b")
    assert "versions" not in json.loads((tmp_path / "a/manifest.json").read_text())["shards"][0]
