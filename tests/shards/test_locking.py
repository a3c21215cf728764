"""One writer for a folder, whatever becomes of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from msa_openclip.shards.storage.locking import LOCK, BeingWritten, one_writer

HOLD = """
import sys
from msa_openclip.shards.storage.locking import one_writer
with one_writer(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_writer_is_refused_by_name_and_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout
    assert holder.stdin
    assert holder.stdout.readline() == "held\n"
    with (
        pytest.raises(BeingWritten, match=rf"process {holder.pid} on .* is writing here. Wait"),
        one_writer(str(tmp_path)),
    ):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdin.close()
    holder.stdout.close()
    assert (tmp_path / LOCK).exists()
    with one_writer(str(tmp_path)):
        pass
    assert list(tmp_path.iterdir()) == []


def test_threads_of_one_process_are_two_writers(tmp_path: Path) -> None:
    refused = []

    def write() -> None:
        try:
            with one_writer(f"file://{tmp_path}"):
                pass
        except BeingWritten as error:
            refused.append(error)

    with one_writer(str(tmp_path)):
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
    assert len(refused) == 1


def test_many_writers_never_hold_it_at_once(tmp_path: Path) -> None:
    """The lock file goes with each holder, so two of them may have opened two files of one name."""
    inside, most, took = 0, 0, 0
    guard = threading.Lock()

    def write() -> None:
        nonlocal inside, most, took
        for _ in range(300):
            try:
                with one_writer(str(tmp_path)):
                    with guard:
                        inside, took = inside + 1, took + 1
                        most = max(most, inside)
                    os.sched_yield()
                    with guard:
                        inside -= 1
            except BeingWritten:
                continue

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert took > 8
