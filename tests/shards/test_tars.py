"""The tar writer writes what the standard library would, and keys survive webdataset's way of splitting names."""

from __future__ import annotations

import hashlib
import io
import string
import tarfile
import zlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from msa_openclip.shards.records import KEY_LIMIT, sample_key
from msa_openclip.shards.storage.tars import SUM_BYTES, BlockSums, TarSink, members, samples

NAMES = st.text(string.ascii_letters + string.digits + "/+-_.%", min_size=1, max_size=100)


def written(files: list[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    sink = TarSink(out)
    for name, data in files:
        sink.add(name, data)
    assert sink.close() == hashlib.sha256(out.getvalue()).hexdigest()
    assert sink.size == len(out.getvalue())
    return out.getvalue()


@pytest.mark.skipif(
    any(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT)[329:345]),
    reason="this Python's tarfile writes device numbers for plain files",
)
@given(st.lists(st.tuples(NAMES, st.binary(max_size=1300)), max_size=5))
def test_bytes_are_those_of_tarfile(files: list[tuple[str, bytes]]) -> None:
    expected = io.BytesIO()
    with tarfile.open(fileobj=expected, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    ours = written(files)
    assert expected.getvalue().startswith(ours)
    assert not expected.getvalue()[len(ours) :].strip(b"\0")


@given(st.text(min_size=1, max_size=150))
@example("/")
def test_keys_are_what_webdataset_finds(image_id: str) -> None:
    key = sample_key(image_id)
    assert len(key) <= KEY_LIMIT
    assert key.isascii()
    assert base_plus_ext(f"{key}.jpg") == (key, "jpg")
    assert base_plus_ext(f"{key}+12.json") == (f"{key}+12", "json")


@given(st.lists(st.text("ab./+%2E-", min_size=1, max_size=6), unique_by=lambda t: tuple(filter(None, t.split("/")))))
def test_keys_tell_image_ids_apart(image_ids: list[str]) -> None:
    image_ids = [image_id for image_id in image_ids if image_id.strip("/")]
    assert len({sample_key(image_id) for image_id in image_ids}) == len(image_ids)


def test_long_keys_that_differ_at_the_end_stay_apart() -> None:
    assert sample_key("x" * 200 + "1") != sample_key("x" * 200 + "2")
    assert sample_key("P0706.s1") == "P0706%2Es1"


def test_members_are_found_by_position_and_grouped_by_key() -> None:
    files = [("d/a.jpg", b"1"), ("d/a.JSON", b"22"), ("b.x.txt", bytes(600)), ("b.jpg", b"4"), ("b.jpg", b"5")]
    data = written(files)
    assert [data[m.offset : m.offset + m.size] for m in members(io.BytesIO(data))] == [data for _, data in files]
    grouped = [(key, [member.extension for member in group]) for key, group in samples(io.BytesIO(data))]
    assert grouped == [("d/a", ["jpg", "json"]), ("b", ["x.txt", "jpg"]), ("b", ["jpg"])]


def test_damaged_headers_are_an_error_not_an_end() -> None:
    data = bytearray(written([("a.jpg", b"1"), ("b.jpg", b"2")]))
    data[1024 + 3] ^= 1
    with pytest.raises(tarfile.ReadError):
        list(members(io.BytesIO(data)))


@given(st.lists(st.integers(0, SUM_BYTES * 5 // 2), max_size=4))
def test_block_sums_do_not_depend_on_how_the_bytes_arrive(lengths: list[int]) -> None:
    whole = b"".join(bytes([number]) * length for number, length in enumerate(lengths))
    sums = BlockSums()
    for number, length in enumerate(lengths):
        sums.add(bytes([number]) * length)
    assert sums.sums == [zlib.crc32(whole[at : at + SUM_BYTES]) for at in range(0, len(whole), SUM_BYTES)]
