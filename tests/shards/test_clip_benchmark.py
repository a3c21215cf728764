"""CLIP_benchmark's own reader sees every image once, with all its captions."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.shards_data import karpathy

from msa_openclip.shards import BuildOptions, build
from msa_openclip.shards.command_line import main


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    source = karpathy(tmp_path / "in", {"train": 4, "test": 7}, captions=3)
    options = BuildOptions(shards=2, name="tiny")
    build(str(source), str(tmp_path / "out"), images=str(tmp_path / "in/images"), options=options)
    return tmp_path / "out"


@pytest.mark.filterwarnings("ignore")
def test_its_reader_reads_ours(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    builder = pytest.importorskip(
        "clip_benchmark.datasets.builder", reason="clip_benchmark (extra test) is not installed"
    )
    assert main(["clip-benchmark", str(shards), str(tmp_path / "bench")]) == 0
    assert "--dataset wds/bench" in capsys.readouterr().out
    data = builder.build_wds_dataset("wds/bench", lambda image: image.size, "test", str(tmp_path / "bench"))
    found = {captions[0].split()[1]: (size, captions) for size, captions in data}
    assert found == {str(n): ((24, 24), [f"picture {n} says {i} ." for i in range(3)]) for n in range(4, 11)}


def test_files_are_laid_out_once_and_again(shards: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert main(["clip-benchmark", str(shards), str(tmp_path / "bench")]) == 0
    names = {str(path.relative_to(tmp_path / "bench")) for path in (tmp_path / "bench").rglob("*") if path.is_file()}
    parts = {f"{split}/{name}" for split in ("train", "test") for name in ("0.tar", "1.tar", "nshards.txt")}
    assert names == {"dataset_type.txt"} | parts
    assert (tmp_path / "bench/test/1.tar").read_bytes() == (shards / "tiny-test-000001.tar").read_bytes()
    assert (tmp_path / "bench/test/nshards.txt").read_text() == "2"


def test_pair_shards_are_refused(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reshard", str(shards), str(tmp_path / "pair"), "--layout", "pair", "--quiet", "--workers", "1"]) == 0
    assert main(["clip-benchmark", str(tmp_path / "pair"), str(tmp_path / "bench")]) == 1
    assert "layout pair; CLIP_benchmark wants layout image: reshard it first" in capsys.readouterr().err


def test_no_file_of_somebody_else_is_replaced(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bench/test").mkdir(parents=True)
    (tmp_path / "bench/test/0.tar").write_bytes(b"precious")
    assert main(["clip-benchmark", str(shards), str(tmp_path / "bench")]) == 1
    assert "bench/test/0.tar: is there already and is not the shard of" in capsys.readouterr().err
    assert (tmp_path / "bench/test/0.tar").read_bytes() == b"precious"
    assert not (tmp_path / "bench/train").exists()


def test_damaged_shards_are_not_laid_out_and_replace_no_whole_copy(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["clip-benchmark", str(shards), str(tmp_path / "bench")]
    assert main(arguments) == 0
    copies = {path: path.read_bytes() for path in sorted((tmp_path / "bench").rglob("*.tar"))}
    shard, copy = shards / "tiny-test-000001.tar", tmp_path / "bench/test/1.tar"
    damaged = bytearray(shard.read_bytes())
    damaged[700] ^= 1
    shard.unlink()  # the copy may be a link to it
    shard.write_bytes(damaged)
    assert main(arguments) == 0
    assert {path: path.read_bytes() for path in copies} == copies
    copy.unlink()
    capsys.readouterr()
    assert main(arguments) == 1
    assert f"{shard}: is not what the manifest says" in capsys.readouterr().err
    assert not copy.exists()


@pytest.mark.parametrize("where", ["", "inside"])
def test_shards_are_not_laid_out_among_themselves(shards: Path, where: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in shards.rglob("*"))
    assert main(["clip-benchmark", str(shards), str(shards / where)]) == 1
    assert "choose a folder apart from" in capsys.readouterr().err
    assert sorted(path.name for path in shards.rglob("*")) == before
