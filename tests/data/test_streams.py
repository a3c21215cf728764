"""Reading shards from stores that fail, have no ranges, change, or do not exist; and the cache that workers share."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from helpers.stream_data import FlakyFile, FlakyFileSystem, flaky_store, write_shards

from msa_openclip.data import streams
from msa_openclip.data.streams import (
    CACHE_VARIABLE,
    RETRIES_VARIABLE,
    RemoteFile,
    StreamError,
    open_shard,
    read_if_there,
    read_location,
)
from msa_openclip.shards.records import Location
from msa_openclip.training.samples import Tally, read_share
from msa_openclip.training.shares import Share, shard_sizes

DATA = bytes(range(256)) * 100


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(FlakyFileSystem, "seekable", True)
    with flaky_store(monkeypatch) as folder:
        MemoryFileSystem().pipe("/flaky/a.tar", DATA)
        yield f"{folder}/a.tar"


def read_all(url: str, size: int = 1000) -> bytes:
    with RemoteFile(url) as file:
        return b"".join(iter(lambda: file.read(size), b""))


@pytest.mark.parametrize("seekable", [True, False])
@pytest.mark.parametrize("failures", [[], [True, False, False, True, True, False, False, False, True]])
def test_a_broken_connection_is_taken_up_where_it_broke(
    flaky: str, failures: list[bool], seekable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FlakyFileSystem, "seekable", seekable)
    FlakyFileSystem.failures = list(failures)
    assert read_all(flaky) == DATA
    assert FlakyFileSystem.failures == []
    assert FlakyFileSystem.opened == (3 if failures else 1)


def test_retries_are_counted_anew_after_success_and_end_with_the_url(
    flaky: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(RETRIES_VARIABLE, "2")
    FlakyFileSystem.failures = [False, *([True, True, False, False] * 5)]
    assert read_all(flaky) == DATA
    assert caplog.text.count(f"{flaky}: ConnectionResetError: gone; trying again in") == 10
    FlakyFileSystem.failures = [False, True, True, True]
    with pytest.raises(
        StreamError, match=rf"{flaky}: failed 3 times, last with ConnectionResetError: gone.*{RETRIES_VARIABLE}"
    ):
        read_all(flaky)


def test_waits_grow_and_are_bounded(flaky: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(streams, "time", SimpleNamespace(sleep=waits.append))
    monkeypatch.setattr(streams, "_FIRST_WAIT_S", 0.5)
    monkeypatch.setenv(RETRIES_VARIABLE, "9")
    FlakyFileSystem.failures = [True] * 10
    with pytest.raises(StreamError, match="failed 10 times"):
        RemoteFile(flaky)
    assert len(waits) == 9
    for attempt, wait in enumerate(waits):
        longest = min(60.0, 0.5 * 2**attempt)
        assert longest / 2 <= wait <= longest


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://no/such.tar", r"memory://no/such\.tar: FileNotFoundError\. Check the name, the braces"),
        ("/no/such.tar", r"/no/such\.tar: FileNotFoundError\. Check the name, the braces"),
        ("nosuch://bucket/a.tar", r"nosuch://bucket/a\.tar: cannot be opened \(.*nosuch"),
    ],
)
def test_what_cannot_get_better_fails_at_once(url: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "time", SimpleNamespace(sleep=lambda _: pytest.fail("waited")))
    with pytest.raises(StreamError, match=message):
        open_shard(url)
    if "nosuch" not in url:
        assert read_if_there(url) is None


def test_one_image_is_read_where_it_lies_with_retries(flaky: str) -> None:
    FlakyFileSystem.failures = [True, True, False]
    assert read_location(Location(flaky, 1000, 7)) == DATA[1000:1007]
    assert FlakyFileSystem.failures == []
    assert read_location(Location(flaky)) == DATA
    FlakyFileSystem.failures = [True] * 100
    with pytest.raises(StreamError, match=rf"{flaky}: failed 6 times"):
        read_location(Location(flaky, 1000, 7))


# ---- cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "new" / "cache"
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    return folder


def content(url: str, **options: bool) -> bytes:
    with open_shard(url, **options) as file:
        return file.read()


def test_a_shard_is_fetched_once(flaky: str, cache: Path) -> None:
    assert content(flaky, fill_cache=False) == DATA
    assert not cache.exists()
    assert content(flaky) == DATA
    (copy,) = cache.iterdir()
    assert copy.name.endswith("-a.tar")
    assert copy.read_bytes() == DATA
    fetched = FlakyFileSystem.opened
    assert content(flaky) == content(flaky, fill_cache=False) == DATA
    assert FlakyFileSystem.opened == fetched


def test_images_come_from_the_copy_and_never_make_one(flaky: str, cache: Path) -> None:
    other = flaky.replace("a.tar", "b.tar")
    MemoryFileSystem().pipe("/flaky/b.tar", DATA)
    assert read_location(Location(other, 5, 9)) == DATA[5:14]
    assert not cache.exists()
    assert content(flaky) == DATA
    FlakyFileSystem.failures = [False]  # to be told that the copy is the right one, once
    assert read_location(Location(flaky, 5, 9)) == DATA[5:14]
    FlakyFileSystem.failures = [True] * 100  # the store is gone
    assert read_location(Location(flaky, 50, 9)) == DATA[50:59]


def test_another_version_of_a_shard_is_fetched_anew(flaky: str, cache: Path) -> None:
    assert content(flaky) == DATA
    MemoryFileSystem().pipe("/flaky/a.tar", b"other")
    assert content(flaky) == b"other"


def test_nothing_but_whole_shards_gets_a_name(flaky: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RETRIES_VARIABLE, "0")
    monkeypatch.setattr(streams, "BLOCK_BYTES", 1000)
    FlakyFileSystem.failures = [False, False, False, True]
    with pytest.raises(StreamError, match="gone"):
        open_shard(flaky)
    assert list(cache.iterdir()) == []
    assert content(flaky) == DATA


def test_an_answer_cut_short_is_refused(flaky: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlakyFile, "read", lambda self, size=-1: b"")
    with pytest.raises(StreamError, match=r"a\.tar: ended after 0 of 25,600 bytes"):
        open_shard(flaky)
    assert list(cache.iterdir()) == []


def test_a_full_cache_folder_is_named(flaky: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(streams.shutil, "copyfileobj", full)
    with pytest.raises(StreamError, match=rf"{cache}: no copy of {flaky} can be kept here.*{CACHE_VARIABLE}"):
        open_shard(flaky)
    assert list(cache.iterdir()) == []


class NoRanges(SimpleHTTPRequestHandler):
    """Python's server, which knows no ranges; it fails `failures` times first."""

    failures = 0
    status = 503
    delay_s = 0.0

    def send_head(self) -> Any:
        time.sleep(NoRanges.delay_s)
        if NoRanges.failures:
            NoRanges.failures -= 1
            self.send_error(NoRanges.status)
            return None
        return super().send_head()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    write_shards(tmp_path / "web", (5, 4))
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(NoRanges, directory=str(tmp_path / "web")))
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    thread.join()
    http.server_close()


def keys(url: str) -> list[str]:
    return [sample["__key__"] for sample in read_share(Share(url), Tally())]


def test_http_without_ranges(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert keys(f"{server}/s-001.tar") == ["k005", "k006", "k007", "k008"]
    assert shard_sizes([f"{server}/s-000.tar", f"{server}/s-001.tar"]) == [5, 4]
    assert shard_sizes([f"{server}/else/s-000.tar"]) is None
    monkeypatch.setattr(streams, "BLOCK_BYTES", 3000)
    assert read_all(f"{server}/s-001.tar") == (tmp_path / "web" / "s-001.tar").read_bytes()
    assert not caplog.records


def test_images_on_a_server_without_ranges_need_the_cache(server: str, tmp_path: Path, monkeypatch) -> None:
    whole = (tmp_path / "web" / "s-000.tar").read_bytes()
    url = f"{server}/s-000.tar"
    with pytest.raises(StreamError, match=rf"{url}: its server gives whole files only, no stretches. Read a copy"):
        read_location(Location(url, 512, 100))
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    assert content(url) == whole
    assert read_location(Location(url, 512, 100)) == whole[512:612]


def test_a_web_server_that_is_overloaded_is_asked_again(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(NoRanges, "failures", 7)
    assert keys(f"{server}/s-000.tar") == [f"k{number:03}" for number in range(5)]
    assert NoRanges.failures == 0
    monkeypatch.setattr(NoRanges, "failures", 100)
    with pytest.raises(StreamError, match="failed 6 times, last with ClientResponseError: 503"):
        open_shard(f"{server}/s-000.tar")
    monkeypatch.setattr(NoRanges, "status", 404)
    monkeypatch.setattr(streams, "time", SimpleNamespace(sleep=lambda _: pytest.fail("waited")))
    with pytest.raises(StreamError, match=r"FileNotFoundError\. Check the name"):
        open_shard(f"{server}/s-000.tar")


def test_processes_share_the_cache_without_locks(server: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NoRanges, "delay_s", 0.5)  # so that none of them finds what another has fetched
    url = f"{server}/s-000.tar"
    code = "import sys; from msa_openclip.data.streams import open_shard; print(len(open_shard(sys.argv[1]).read()))"
    processes = [subprocess.Popen([sys.executable, "-c", code, url], stdout=subprocess.PIPE) for _ in range(3)]
    found = {int(process.communicate(timeout=50)[0]) for process in processes}
    (copy,) = cache.iterdir()
    assert found == {copy.stat().st_size} == {len(content(url))}
