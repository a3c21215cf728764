"""Worker processes: results and errors come back, main modules are not run again, nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.shards_data import karpathy, shard_bytes

from msa_openclip.shards import BuildOptions, ImageOptions, ShardError, build
from msa_openclip.shards.building.plan import Sample
from msa_openclip.shards.building.writer import ShardJob, write_shard
from msa_openclip.shards.records import Location, Record
from msa_openclip.shards.running import engines, stopping, worker


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


def test_a_cluster_that_is_not_named_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ray.init` would connect to any that runs on this machine, and refuse to be told its processors."""
    started: list[dict[str, Any]] = []
    ray = SimpleNamespace(is_initialized=lambda: False, init=lambda **settings: started.append(settings))
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    engines.start_ray(3)
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    engines.start_ray(3)
    own, named = started
    assert (own["address"], own["num_cpus"]) == ("local", 3)
    assert not named.keys() & {"address", "num_cpus"}


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


ENDLESS = """
import os
import signal
import time
from pathlib import Path
from msa_openclip.shards.building import writer as shard_writer

signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let what they run in the background ignore Ctrl-C
prepare, calls = shard_writer.prepare, []

def third_never_ends(*arguments):
    calls.append(1)
    if len(calls) < 3:
        return prepare(*arguments)
    Path(__file__).with_name(f"{os.getpid()}.waits").touch()
    while True:
        time.sleep(0.01)

shard_writer.prepare = third_never_ends
"""


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_build_ends_amid_its_jobs_and_removes_half_written_files(
    tmp_path: Path, workers: int, number: int, code: int
) -> None:
    source = karpathy(tmp_path / "in", {"train": 12})
    out, patch = tmp_path / "out", tmp_path / "patch"
    patch.mkdir()
    (patch / "sitecustomize.py").write_text(ENDLESS)  # in the workers too: no machine is fast enough to end a job
    arguments = [str(source), str(out), "--images", str(source.parent / "images"), "--shards", "2", "--quiet"]
    command = [sys.executable, "-m", "msa_openclip.shards", "build", *arguments, "--workers", str(workers)]
    environment = os.environ | {"PYTHONPATH": str(patch)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    while len(list(patch.glob("*.waits"))) < workers:
        assert process.poll() is None
        time.sleep(0.01)
    assert len(list(out.glob(".train-*.tmp"))) == workers
    process.send_signal(number)
    _, errors = process.communicate()
    assert errors == "interrupted; the same command goes on from here\n"
    assert process.returncode == code
    assert [path.name for path in out.iterdir()] == [".build"]


@pytest.mark.parametrize("engine", ["thread", "process"])
def test_jobs_in_flight_are_stopped_when_nobody_waits_for_them(
    tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_PATIENCE_S", 3600.0)
    results = engines.run(for_ever_unless, iter([tmp_path / "first", None, None, None]), engine, 2, in_memory=False)
    assert next(results) == tmp_path / "first"
    results.close()  # the test ends if the jobs do


def for_ever_unless(path: Path | None) -> Path | None:
    """A job with many samples, or none."""
    while not path:
        stopping.check()
        time.sleep(0.01)
    return path


def test_a_worker_that_does_not_hear_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_PATIENCE_S", 0.1)
    results = engines.run(go_deaf_or_wait, iter([(tmp_path / "deaf", True), (tmp_path / "deaf", False)]), "process", 2,
                          in_memory=False)  # fmt: skip
    assert next(results)
    results.close()


def go_deaf_or_wait(job: tuple[Path, bool]) -> bool:
    """Two jobs: one that takes no signal and says so by a file, and one that waits until it does."""
    file, deaf = job
    if deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        file.touch()
    while deaf or not file.exists():
        time.sleep(0.01)
    return True


def test_a_stopped_job_leaves_no_file(tmp_path: Path) -> None:
    source = karpathy(tmp_path / "in", {"train": 3})
    place = Location(str(source.parent / "images/0.jpg"))
    sample = Sample(Record("0", place, "0.jpg", ("a picture",), "train"), None)
    job = ShardJob("train-000000.tar", "train", str(tmp_path), (sample, sample), ImageOptions())
    stop = threading.Event()
    stop.set()
    with pytest.raises(stopping.Stopped):
        stopping.call_until(stop, write_shard, job)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_what_a_killed_worker_left_is_removed(tmp_path: Path) -> None:
    source = karpathy(tmp_path / "in", {"train": 120}, suffix="tif")
    slow = ImageOptions(resize_px=600, resize_mode="squash", encode="png")
    options = BuildOptions(shards=1, image=slow)
    out = tmp_path / "out"
    with ThreadPoolExecutor(1) as pool:
        building = pool.submit(
            build, str(source), str(out), images=str(source.parent / "images"), workers=2, options=options
        )
        while not (files := list(out.glob(".train-*.tmp"))):
            assert not building.done()
            time.sleep(0.01)
        os.kill(writer_of(files[0]), signal.SIGKILL)
        with pytest.raises(ShardError, match=r"a worker process died \(exit code -9"):
            building.result()
    assert [path.name for path in out.iterdir()] == [".build"]


def writer_of(file: Path) -> int:
    """The process that has the file open."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if link.readlink() == file:
                return int(link.parts[2])
    raise AssertionError(f"nobody has {file} open")


def test_a_clone_without_installation_builds_in_parallel(tmp_path: Path) -> None:
    source = karpathy(tmp_path / "in", {"train": 12})
    for package, workers in (("shards", "2"), ("msa_openclip.shards", "1")):
        arguments = [str(source), str(tmp_path / package), "--images", str(source.parent / "images"), "--shards", "3"]
        command = [sys.executable, "-m", package, "build", *arguments, "--workers", workers, "--quiet"]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[2], capture_output=True)
    assert shard_bytes(tmp_path / "shards") == shard_bytes(tmp_path / "msa_openclip.shards") != {}
