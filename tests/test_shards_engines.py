"""Worker processes: results and errors come back, main modules are not run again, nothing is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from shards_data import karpathy, shard_bytes

from msa_openclip.shards import ShardError, engines


def test_results_of_all_jobs_come_back_from_other_processes() -> None:
    found = list(engines.run(divmod_of_pid, iter(range(7)), "process", 2, in_memory=False))
    assert sorted(number for number, _ in found) == list(range(7))
    assert os.getpid() not in {pid for _, pid in found}


def divmod_of_pid(number: int) -> tuple[int, int]:
    """The job's number and who did it."""
    return number, os.getpid()


def test_errors_travel_as_they_are() -> None:
    with pytest.raises(ZeroDivisionError):
        list(engines.run(partial(divmod, 5), iter([1, 0]), "process", 2, in_memory=False))


def test_a_dead_worker_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ShardError, match=r"worker process died \(exit code 7; .* fewer --workers"):
        list(engines.run(os._exit, iter([7, 7]), "process", 2, in_memory=False))


def test_jobs_are_made_only_as_they_are_needed() -> None:
    made: list[int] = []
    jobs = (made.append(number) or number for number in range(50))  # type: ignore[func-returns-value]
    results = engines.run(abs, jobs, "thread", 2, in_memory=False)
    next(results)
    assert len(made) <= 2 * 2 + 1
    results.close()


def test_bad_engines_and_counts_are_refused() -> None:
    with pytest.raises(ShardError, match="engine: 'spark' is unknown; choose one of auto, process, thread, ray"):
        list(engines.run(abs, iter([1]), "spark", 2, in_memory=False))
    with pytest.raises(ShardError, match="workers: 0 must be at least 1"):
        list(engines.run(abs, iter([1]), "auto", 0, in_memory=False))


def test_a_script_without_main_guard_can_build_in_parallel_and_runs_once(tmp_path: Path) -> None:
    source = karpathy(tmp_path / "in", {"train": 12})
    script = tmp_path / "script.py"
    script.write_text(
        f"print('ran')\nfrom msa_openclip.shards import build, BuildOptions\n"
        f"build({str(source)!r}, {str(tmp_path / 'out')!r}, images={str(source.parent / 'images')!r},"
        " workers=2, options=BuildOptions(shards=3))\n"
    )
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert run.stdout == "ran\n"
    assert run.stderr == ""


def test_an_interrupted_build_removes_its_half_written_files(tmp_path: Path) -> None:
    source = karpathy(tmp_path / "in", {"train": 400}, suffix="tif")
    images = str(source.parent / "images")
    arguments = [str(source), str(tmp_path / "out"), "--images", images, "--shards", "2", "--workers", "2"]
    slow = ["--resize-px", "500", "--resize-mode", "squash", "--quiet"]
    command = [sys.executable, "-m", "msa_openclip.shards", "build", *arguments, *slow]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "out").glob(".train-*.tmp"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(2)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors == "interrupted; the same command goes on from here\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".build"]


def test_a_clone_without_installation_builds_in_parallel(tmp_path: Path) -> None:
    source = karpathy(tmp_path / "in", {"train": 12})
    for package, workers in (("shards", "2"), ("msa_openclip.shards", "1")):
        arguments = [str(source), str(tmp_path / package), "--images", str(source.parent / "images"), "--shards", "3"]
        command = [sys.executable, "-m", package, "build", *arguments, "--workers", workers, "--quiet"]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[1], capture_output=True)
    assert shard_bytes(tmp_path / "shards") == shard_bytes(tmp_path / "msa_openclip.shards") != {}
