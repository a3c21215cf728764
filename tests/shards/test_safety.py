"""What goes wrong is survived or found: kills, full disks, other builds in the folder, damaged shards."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from helpers.shards_data import karpathy, shard_bytes, tar_members

from msa_openclip.shards import BuildOptions, ImageOptions, ShardError, build, verify
from msa_openclip.shards.building.writer import DiskFull
from msa_openclip.shards.command_line import main
from msa_openclip.shards.running.worker import Worker


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return karpathy(tmp_path / "in", {"train": 90}, captions=2)


def run_build(source: Path, out: Path | str, **options: Any) -> Any:
    made = BuildOptions(**{"shards": 6} | options)
    return build(str(source), str(out), images=str(source.parent / "images"), options=made)


def test_workers_import_nothing_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pickle", "signal", "os"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('code of a data folder ran')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])  # as a console script has it
    worker = Worker()
    assert worker.call(len, [1, 2]) == 2
    worker.terminate()
    worker.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_build_resumes_and_ends_byte_identical(tmp_path: Path, workers: int) -> None:
    source = karpathy(tmp_path / "in", {"train": 240}, suffix="tif")
    images = str(source.parent / "images")
    resize = ["--resize-px", "200", "--resize-mode", "squash"]  # slow enough to be caught in the act
    arguments = ["build", str(source), str(tmp_path / "out"), "--images", images, "--shards", "16", *resize]
    command = [sys.executable, "-m", "msa_openclip.shards", *arguments, "--workers", str(workers), "--quiet"]
    process = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "out").glob("*.tar"))) < 4:
        assert process.poll() is None, "the build ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while alive_in_session(process.pid):  # the workers end with the build
        assert time.monotonic() < deadline, "workers outlive the killed build"
        time.sleep(0.05)
    finished = shard_bytes(tmp_path / "out")
    assert 4 <= len(finished) < 16
    assert not (tmp_path / "out/manifest.json").exists()

    options = BuildOptions(shards=16, image=ImageOptions(resize_px=200, resize_mode="squash"))
    kept = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in finished}
    summary = build(str(source), str(tmp_path / "out"), images=images, options=options, workers=2)
    assert summary.resumed_shards >= 1  # what was in flight at the kill is written again
    unchanged = [name for name in kept if (tmp_path / "out" / name).stat().st_mtime_ns == kept[name]]
    assert len(unchanged) == summary.resumed_shards
    build(str(source), str(tmp_path / "whole"), images=images, options=options, workers=2)
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "whole")
    for name in ("manifest.json", "sizes.json", "rejected.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".tar") == [
        "manifest.json", "rejected.jsonl", "sizes.json",
    ]  # fmt: skip


def alive_in_session(session: int) -> list[int]:
    """Processes of a session that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def test_a_finished_build_is_left_alone_and_another_is_refused(tmp_path: Path, source: Path) -> None:
    run_build(source, tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert run_build(source, tmp_path / "out").resumed_shards == 6
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(ShardError, match=r"holds a build from other input, options or versions \(changed: seed\)"):
        run_build(source, tmp_path / "out", seed=1)
    source.write_text(source.read_text().replace("picture 7 says", "image 7 says"))
    with pytest.raises(ShardError, match="the input changed"):
        run_build(source, tmp_path / "out")
    fewer = BuildOptions(shards=2)
    build(str(source), str(tmp_path / "out"), images=str(source.parent / "images"), options=fewer, overwrite=True)
    assert len(shard_bytes(tmp_path / "out")) == 2
    assert verify(str(tmp_path / "out")).ok


def test_an_unfinished_build_refuses_other_options(tmp_path: Path, source: Path) -> None:
    victim = source.parent / "images/3.jpg"
    data = victim.read_bytes()
    victim.write_bytes(b"broken")
    with pytest.raises(ShardError, match="not an image"):
        build(str(source), str(tmp_path / "out"), images=str(source.parent / "images"), options=BuildOptions(shards=6),
              strict=True)  # fmt: skip
    victim.write_bytes(data)
    with pytest.raises(ShardError, match=r"unfinished build from other input or options \(changed: layout, seed\)"):
        run_build(source, tmp_path / "out", seed=5, layout="pair")
    run_build(source, tmp_path / "out")
    assert verify(str(tmp_path / "out")).ok


def test_foreign_shards_in_the_folder_are_not_mixed_in(tmp_path: Path, source: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/train-000009.tar").write_bytes(bytes(1024))
    with pytest.raises(ShardError, match=r"holds shards already, e.g. train-000009.tar"):
        run_build(source, tmp_path / "out")


def test_a_shard_that_comes_out_empty_is_an_error_with_the_reason(tmp_path: Path) -> None:
    source = karpathy(tmp_path / "in", {"train": 4})
    (tmp_path / "in/images/2.jpg").write_bytes(b"broken")
    with pytest.raises(ShardError, match=r"nothing is left in 1 of 4 shards, e.g. 2.jpg: not an image.*fewer shards"):
        run_build(source, tmp_path / "out", shards=4)
    assert '"2.jpg"' in (tmp_path / "out/rejected.jsonl").read_text()


class SmallDisk(MemoryFileSystem):
    """Memory that is full after so many bytes."""

    protocol = "smalldisk"
    store: dict[str, Any] = {}  # noqa: RUF012 -- as fsspec declares it
    room = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("smalldisk://")))

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> MemoryFile:
        file = super()._open(path, mode, **kwargs)
        if mode == "wb":
            write = file.write

            def limited(data: bytes) -> int:
                SmallDisk.room -= len(data)
                if SmallDisk.room < 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return write(data)

            file.write = limited
        return file


def test_a_full_store_keeps_finished_shards_and_resumes(source: Path, tmp_path: Path) -> None:
    fsspec.register_implementation("smalldisk", SmallDisk, clobber=True)
    run_build(source, tmp_path / "whole")
    reference = shard_bytes(tmp_path / "whole")
    SmallDisk.room = sum(map(len, reference.values())) * 2 // 3
    with pytest.raises(DiskFull, match=r"train-00000\d.tar: no space left .* run the same command again"):
        run_build(source, "smalldisk://out")
    there = SmallDisk().find("/out")
    assert 0 < sum(name.endswith(".tar") for name in there) < 6
    assert not any(name.endswith(".tmp") for name in there)
    SmallDisk.room = 10**9
    assert run_build(source, "smalldisk://out").resumed_shards > 0
    assert {name[5:]: SmallDisk().cat(name) for name in SmallDisk().find("/out") if name.endswith(".tar")} == reference
    assert verify("smalldisk://out").ok


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root and CAP_SYS_ADMIN, which this process lacks")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_gives_a_message_and_a_row_not_a_broken_shard(
    source: Path, tiny_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_build(source, tmp_path / "whole")
    filler = tiny_disk / "filler"
    filler.write_bytes(bytes(60 << 10))
    arguments = ["build", str(source), str(tiny_disk / "out"), "--images", str(source.parent / "images")]
    assert main([*arguments, "--shards", "6", "--quiet", "--workers", "1"]) == 1
    assert "no space left for this shard" in capsys.readouterr().err
    for name, data in shard_bytes(tiny_disk / "out").items():
        assert data == (tmp_path / "whole" / name).read_bytes()
    assert len(shard_bytes(tiny_disk / "out")) < 6
    os.remove(filler)
    subprocess.run(["mount", "-o", "remount,size=4m", str(tiny_disk)], check=True)
    assert main([*arguments, "--shards", "6", "--quiet", "--workers", "1"]) == 0
    assert shard_bytes(tiny_disk / "out") == shard_bytes(tmp_path / "whole")


@pytest.mark.parametrize("position", [0, 4242, -5000])
def test_verify_names_the_flipped_byte(tmp_path: Path, source: Path, position: int) -> None:
    run_build(source, tmp_path / "out")
    assert verify(str(tmp_path / "out"), decode=True).ok
    path = tmp_path / "out/train-000002.tar"
    data = bytearray(path.read_bytes())
    position %= len(data)
    before = data[position]
    data[position] ^= 0x40
    path.write_bytes(data)
    problems = verify(str(tmp_path / "out")).problems
    assert [problem.file for problem in problems] == ["train-000002.tar"]
    assert f"byte {position:,} is {data[position]:#04x} and should be {before:#04x}" in problems[0].what


def test_verify_names_the_byte_beyond_the_first_mebibyte_and_its_member(tmp_path: Path) -> None:
    source = karpathy(tmp_path / "in", {"train": 60})
    options = BuildOptions(shards=1, image=ImageOptions(resize_px=120, resize_mode="squash", encode="png"))
    build(str(source), str(tmp_path / "out"), images=str(source.parent / "images"), options=options)
    path = tmp_path / "out/train-000000.tar"
    data = bytearray(path.read_bytes())
    offset = 0
    for name, content in tar_members(path):
        offset += 512
        if offset > 1_100_000 and name.endswith(".png"):
            break
        offset += -(-len(content) // 512) * 512
    data[offset + 100] ^= 1
    path.write_bytes(data)
    assert f"byte {offset + 100:,} is" in verify(str(tmp_path / "out")).problems[0].what
    assert f"in {name}" in verify(str(tmp_path / "out")).problems[0].what
    data[offset + 100 : offset + 200] = bytes(100)
    path.write_bytes(data)
    assert "the first bad byte lies within bytes 1,048,576 to" in verify(str(tmp_path / "out")).problems[0].what


def test_verify_finds_cut_grown_missing_and_stray_shards(tmp_path: Path, source: Path) -> None:
    run_build(source, tmp_path / "out")
    out = tmp_path / "out"
    cut = out / "train-000001.tar"
    size = cut.stat().st_size
    os.truncate(cut, 5000)
    with (out / "train-000003.tar").open("ab") as file:
        file.write(b"more")
    (out / "train-000004.tar").unlink()
    shutil.copy(out / "train-000000.tar", out / "train-000017.tar")
    sizes = json.loads((out / "sizes.json").read_text())
    sizes["train-000000.tar"] += 1
    (out / "sizes.json").write_text(json.dumps(sizes))
    problems = dict(verify(str(out), workers=2).problems)
    assert problems["train-000001.tar"].startswith(f"cut short: ends at byte 5,000 of {size:,}, ")
    assert problems["train-000003.tar"].startswith("4 bytes too many")
    assert problems["train-000004.tar"] == "missing"
    assert problems["train-000017.tar"].startswith("is not in the manifest")
    assert "train-000000.tar: 16, expected 15" in problems["sizes.json"]
    assert len(problems) == 5


def test_verify_decode_finds_an_image_that_was_bad_from_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = karpathy(tmp_path / "in", {"train": 9}, suffix="png")
    victim = tmp_path / "in/images/4.png"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 255
    victim.write_bytes(data)
    run_build(source, tmp_path / "out", shards=1)
    assert main(["verify", str(tmp_path / "out"), "--quiet"]) == 0
    assert main(["verify", str(tmp_path / "out"), "--quiet", "--decode", "--workers", "1"]) == 1
    assert "4.png cannot be decoded" in capsys.readouterr().out
    with pytest.raises(ShardError, match="holds no finished build"):
        verify(str(tmp_path / "in"))
