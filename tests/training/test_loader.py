"""Training and validation loaders: who sees which sample and caption, and what is refused or reported."""

from __future__ import annotations

import gzip
import logging
import math
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip_train.data
import pytest
import webdataset as wds
from helpers import stream_data
from helpers.host import images_and_texts, traits
from helpers.hostile_tars import HOSTILE
from helpers.stream_data import arguments, caption, image_bytes, image_sample, stop_workers, tar_bytes, write_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip_train.data import DataInfo, SharedEpoch

from msa_openclip.data.streams import StreamError, open_shard
from msa_openclip.training import samples as shard_samples
from msa_openclip.training.loader import ShardBatches
from msa_openclip.training.samples import PATIENCE, Tally, decode, draw_caption, read_share
from msa_openclip.training.shares import LoaderWorker, ShardDataError, Share, part_of, shard_sizes

pytestmark = pytest.mark.timeout(180)
_opened: list[DataInfo] = []


@pytest.fixture(autouse=True)
def _stopped_workers() -> Iterator[None]:
    yield
    while _opened:
        stop_workers(_opened.pop())


def dataset(pattern: str, *, is_train: bool = True, **changes: Any) -> DataInfo:
    """By the name under which open_clip_train looks it up."""
    get = open_clip_train.data.get_dataset_fn(pattern, "webdataset")
    args = arguments(pattern, **changes)
    if not is_train:
        args.train_data = None  # validation alone: before a training, all of it is read once more for the metrics
    numbers = {"tokenizer": stream_data.caption_numbers, **traits()}
    _opened.append(get(args, stream_data.image_number, is_train=is_train, **numbers))
    return _opened[-1]


def batches(data: DataInfo, epoch: int = 0) -> list[list[tuple[int, int]]]:
    """(image, caption) of every row of an epoch; each row's image and caption belong together."""
    data.set_epoch(epoch)
    found = []
    for images, texts in map(images_and_texts, data.dataloader):
        assert images[:, 0].equal(texts[:, 0])
        found.append([(image, index) for image, index in texts.tolist()])
    return found


def rows(data: DataInfo, epoch: int = 0) -> list[tuple[int, int]]:
    return [row for batch in batches(data, epoch) for row in batch]


# ---- which samples


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=7).filter(sum),
    batch_size=st.integers(1, 11),
    ranks=st.integers(1, 4),
    workers=st.integers(0, 5),
    epoch=st.integers(0, 3),
)
def test_readers_split_an_epoch_by_sample(
    sizes: list[int], batch_size: int, ranks: int, workers: int, epoch: int
) -> None:
    urls, total = [str(index) for index in range(len(sizes))], sum(sizes)
    count = math.ceil(total / (batch_size * ranks))
    seen: Counter[tuple[str, int]] = Counter()
    for rank in range(ranks):
        for worker in range(max(1, workers)):
            batches = ShardBatches(
                urls=urls, sizes=sizes, resampled=None, batches=count, batch_size=batch_size, is_train=True, seed=5,
                epoch=SharedEpoch(epoch), rank=rank, ranks=ranks,
                preprocess=stream_data.image_number, tokenizer=stream_data.caption_numbers,
            )  # fmt: skip
            begin, end = part_of(count, worker, max(1, workers))
            mine = [
                (share.url, index)
                for share in batches.shares(LoaderWorker(rank, ranks, worker, max(1, workers)))
                for index in range(share.start, share.stop or 0)
            ]
            assert len(mine) == len(set(mine)) == min(total, (end - begin) * batch_size)
            seen.update(mine)
    assert set(seen) == {(url, index) for url, size in zip(urls, sizes, strict=True) for index in range(size)}
    assert seen.total() < total + batch_size * ranks


@given(st.integers(0, 50), st.integers(1, 12))
def test_parts_cover_everything_once_and_evenly(count: int, parts: int) -> None:
    ranges = [part_of(count, part, parts) for part in range(parts)]
    assert [i for begin, end in ranges for i in range(begin, end)] == list(range(count))
    lengths = [end - begin for begin, end in ranges]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("counts", [(19,), (5, 0, 7, 3, 4)], ids=["one shard", "five shards"])
def test_training_sees_each_image_once_and_less_than_a_global_batch_twice(
    tmp_path: Path, counts: tuple[int, ...], ranks: int, workers: int
) -> None:
    pattern = write_shards(tmp_path, counts)
    ranked = [dataset(pattern, rank=rank, world_size=ranks, workers=workers) for rank in range(ranks)]
    orders = []
    for epoch in (0, 1):
        found = [batches(data, epoch) for data in ranked]
        for data, own in zip(ranked, found, strict=True):
            assert len(own) == data.dataloader.num_batches == math.ceil(19 / (4 * ranks))
            assert data.dataloader.num_samples == len(own) * 4 * ranks
            assert [len(batch) for batch in own] == [4] * len(own)
            assert all(len(set(batch)) == 4 for batch in own), "no image twice in a batch"
        images = Counter(image for own in found for batch in own for image, _ in batch)
        assert set(images) == set(range(19))
        assert max(images.values()) <= 2
        orders.append([image for own in found for batch in own for image, _ in batch])
    assert orders[0] != orders[1], "another order in another epoch"
    assert [image for data in ranked for image, _ in rows(data, 0)] == orders[0], "the same order in the same epoch"


def test_no_shard_is_read_twice_to_fill_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = write_shards(tmp_path, (9,))
    data = dataset(pattern)
    opened: list[str] = []
    monkeypatch.setattr(shard_samples, "open_shard", lambda url, **_: opened.append(url) or open_shard(url))
    assert len(rows(data)) == 12
    assert len(opened) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_pair_shards_give_every_caption_once(tmp_path: Path, workers: int) -> None:
    data = dataset(write_shards(tmp_path, (4, 4, 2), captions=2, layout="pair"), workers=workers)
    assert sorted(rows(data)) == [(image, index) for image in range(10) for index in range(2)]


def test_more_or_fewer_samples_than_there_are_can_be_asked_for(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, (5, 6))
    few = dataset(pattern, train_num_samples=8)
    assert len({image for image, _ in rows(few)}) == 8
    assert len({image for epoch in range(6) for image, _ in rows(few, epoch)}) == 11, "others in other epochs"
    many = Counter(image for image, _ in rows(dataset(pattern, train_num_samples=44)))
    assert set(many) == set(range(11))
    assert set(many.values()) == {4}


@pytest.mark.parametrize("workers", [0, 2])
def test_without_sizes_whole_shards_are_dealt_out(tmp_path: Path, workers: int) -> None:
    pattern = write_shards(tmp_path, (3, 3, 3, 3), sizes=False)
    found = []
    for rank in range(2):
        data = dataset(pattern, rank=rank, world_size=2, workers=workers, train_num_samples=12, batch_size=3)
        found += batches(data)
    assert {image for batch in found for image, _ in batch} == set(range(12))
    assert all(len(batch) == 3 for batch in found)


def test_fewer_samples_in_a_shard_than_in_a_batch_do_not_wait_forever(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, (3, 3), sizes=False)
    assert len(batches(dataset(pattern, train_num_samples=6, batch_size=5, workers=2))) == 2


def test_resampling_draws_shards_with_replacement(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, (3, 4, 5))
    data = dataset(pattern, dataset_resampled=True)
    assert len(batches(data)) == data.dataloader.num_batches == 3
    folder = tmp_path / "other"
    write_shards(folder, (3,))
    union = f"{tmp_path}/s-000.tar::{tmp_path}/s-001.tar"
    data = dataset(union, dataset_resampled=True, train_data_upsampling_factors="1::0", train_num_samples=40)
    assert {image for image, _ in rows(data)} == {0, 1, 2}
    with pytest.raises(ShardDataError, match="give both"):
        dataset(union, train_data_upsampling_factors="1::0")


# ---- which captions


def test_the_caption_depends_on_seed_epoch_and_key_alone(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, (6, 7, 6), captions=3)

    def drawn(epoch: int, **changes: Any) -> dict[int, int]:
        ranks = changes.get("world_size", 1)
        return {k: v for rank in range(ranks) for k, v in rows(dataset(pattern, rank=rank, **changes), epoch)}

    once = drawn(1)
    assert len(set(once.values())) > 1, "not the same one of every image"
    assert once == drawn(1, workers=2) == drawn(1, world_size=2) == drawn(1, world_size=2, workers=2, batch_size=3)
    assert once != drawn(2)
    assert once != drawn(1, seed=1)


@given(count=st.integers(1, 7), key=st.text(), seed=st.integers(0, 9), lap=st.integers(0, 5))
def test_every_caption_comes_once_in_as_many_epochs_as_there_are(count: int, key: str, seed: int, lap: int) -> None:
    captions = [str(index) for index in range(count)]
    drawn = [draw_caption(captions, key, seed, lap * count + step) for step in range(count)]
    assert sorted(drawn) == captions


def test_laps_and_images_have_orders_of_their_own() -> None:
    captions = list("abcde")

    def order(key: str, lap: int) -> list[str]:
        return [draw_caption(captions, key, 0, lap * 5 + step) for step in range(5)]

    assert len({tuple(order(key, lap)) for key in "xyz" for lap in range(4)}) > 9


# ---- validation


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("layout", ["image", "pair"])
@pytest.mark.parametrize("sizes", [True, False])
def test_validation_sees_every_caption_once_with_its_image(
    tmp_path: Path, layout: str, workers: int, sizes: bool
) -> None:
    pattern = write_shards(tmp_path, (2, 3), captions=3, layout=layout, sizes=sizes)
    for rank in (0, 1):  # open_clip validates on one rank, on everything
        data = dataset(pattern, is_train=False, workers=workers, rank=rank, world_size=2)
        expected = [(image, index) for image in range(5) for index in range(3)]
        assert sorted(rows(data)) == expected
        assert sorted(rows(data)) == expected, "and again after the next epoch"


# ---- layouts and places


def test_blank_lines_are_no_captions_and_spaces_do_not_count(tmp_path: Path) -> None:
    text = f"\n  {caption(3, 0)}  \n\n \t\n{caption(3, 1)}\r\n"
    (tmp_path / "a.tar").write_bytes(tar_bytes([("k.jpg", image_bytes(3, "JPEG")), ("k.txt", text.encode())]))
    samples = list(read_share(Share(str(tmp_path / "a.tar")), Tally()))
    assert [sample["captions"] for sample in samples] == [[caption(3, 0), caption(3, 1)]]


def test_extensions_count_in_any_case_and_other_members_are_passed_over(tmp_path: Path) -> None:
    members = [("d/K.JSON", b"no json"), ("d/K.Jpeg", image_bytes(3)), ("d/K.TXT", b"x"), ("d/K.seg.png", b"")]
    (tmp_path / "a.tar").write_bytes(tar_bytes([("__meta__/x.txt", b"x"), ("README", b"x"), *members]))
    (sample,) = read_share(Share(str(tmp_path / "a.tar")), Tally())
    assert (sample["__key__"], sample["captions"], sample["image"]) == ("d/K", ["x"], image_bytes(3))


@settings(max_examples=40, deadline=None)
@given(start=st.integers(0, 6), length=st.integers(0, 6))
def test_a_share_is_its_samples_of_the_shard(tmp_path_factory: pytest.TempPathFactory, start: int, length: int) -> None:
    folder = tmp_path_factory.getbasetemp() / "shares"
    url = write_shards(folder, (6,)).replace("{000..000}", "000")
    stop = min(6, start + length)
    for size in (None, 6):
        keys = [sample["__key__"] for sample in read_share(Share(url, start, stop, size), Tally())]
        assert keys == [f"k{number:03}" for number in range(start, stop)]


def test_sizes_come_from_the_folder_of_each_shard(tmp_path: Path) -> None:
    for name, counts in (("a", (2, 3)), ("b", (4,))):
        write_shards(tmp_path / name, counts)
    urls = [f"{tmp_path}/{name}" for name in ("a/s-000.tar", "b/s-000.tar", "a/s-001.tar")]
    assert shard_sizes(urls) == [2, 4, 3]
    assert shard_sizes([*urls, f"{tmp_path}/a/s-002.tar"]) is None
    union = f"{tmp_path}/a/s-{{000..001}}.tar::{tmp_path}/b/s-000.tar"
    assert dataset(union, batch_size=3).dataloader.num_samples == 9
    for text in ("[4]", "3", "", "[" * 100_000, '{"s-000.tar": -4}', '{"s-000.tar": "4"}', '{"s-000.tar": 4.5}',
                 '{"s-000.tar": true}', '{"s-000.tar": NaN}', '{"s-000.tar": 4, "s-000.tar": 5}'):  # fmt: skip
        (tmp_path / "b" / "sizes.json").write_text(text)
        with pytest.raises(ShardDataError, match=r"b/sizes\.json: not an object"):
            shard_sizes(urls)


def test_pipes_are_read(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, (4, 5), sizes=False)
    data = dataset(f"pipe:cat {pattern}", train_num_samples=9, batch_size=3)
    assert {image for image, _ in rows(data)} == set(range(9))


# ---- loud failures


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("compressed", [False, True])
def test_tars_that_lead_a_reader_astray_end_an_epoch_by_name(tmp_path: Path, what: str, compressed: bool) -> None:
    path = tmp_path / "a.tar"
    data = tar_bytes([*image_sample(0, 1), *image_sample(1, 1)]).rstrip(b"\0")
    data += bytes(-len(data) % 512) + HOSTILE[what]
    path.write_bytes(gzip.compress(data, 1) if compressed else data)
    with pytest.raises(StreamError, match=r"a\.tar: damaged, or not a tar"):
        rows(dataset(str(path), train_num_samples=2, batch_size=1))


def test_a_shard_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(StreamError, match=r"a\.tar: not a regular file but a pipe"):
        dataset(str(tmp_path / "a.tar"), train_num_samples=2)


def test_names_that_are_not_utf8_are_left_out_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = [image_sample(number, 1) for number in range(4)]
    samples[1] = [(name.replace("k001", "caf\udce9"), data) for name, data in samples[1]]
    data = dataset(wrong(tmp_path, *samples), train_num_samples=4, batch_size=4)
    with caplog.at_level(logging.WARNING):
        assert {image for image, _ in rows(data)} == {0, 2, 3}
    assert r"sample caf\udce9: its name is not UTF-8" in caplog.text


def wrong(tmp_path: Path, *samples: list[tuple[str, bytes]]) -> str:
    (tmp_path / "a.tar").write_bytes(tar_bytes([member for sample in samples for member in sample]))
    return str(tmp_path / "a.tar")


JPEG, TEXT = image_bytes(1, "JPEG"), b"a caption"


@pytest.mark.parametrize("is_train", [True, False], ids=["train", "val"])
@pytest.mark.parametrize(
    ("samples", "found"),
    [
        ([[("k1.tif", JPEG), ("k1.txt", TEXT)]], "1 x no image among the members tif, txt"),
        ([[("k1.img_content", JPEG), ("k1.caption", TEXT)]], "no image among the members caption, img_content"),
        ([[("k1.jpg", JPEG), ("k1.json", b"{}")]], "no captions among the members jpg, json"),
        ([[("k1.jpg", JPEG), ("k1.txt", b" \n")]], "captions are blank"),
        ([[("k1.jpg", JPEG), ("k1.txt", b"\xff")]], "captions are not UTF-8"),
        ([[("no_extension", JPEG)]], "no sample at all"),
        ([], "no sample at all"),
        ([[(f"k{i}.tif", JPEG), (f"k{i}.txt", TEXT)] for i in range(PATIENCE + 99)], f"{PATIENCE} x no image"),
    ],
)
def test_shards_without_a_usable_sample_are_refused_at_once(
    tmp_path: Path, samples: list[Any], found: str, is_train: bool
) -> None:
    with pytest.raises(ShardDataError, match=r"no sample can be used\. Found: ") as error:
        dataset(wrong(tmp_path, *samples), is_train=is_train, train_num_samples=5)
    assert found in str(error.value)
    assert "a.tar" in str(error.value)
    assert "Expected: KEY.txt with captions, one a line, and one of KEY.jpg, KEY.png" in str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("is_train", [True, False], ids=["train", "val"])
def test_images_that_all_fail_to_decode_end_the_epoch(tmp_path: Path, is_train: bool, workers: int) -> None:
    broken = [[(f"k{i}.jpg", b"not a JPEG"), (f"k{i}.txt", TEXT)] for i in range(5)]
    data = dataset(wrong(tmp_path, *broken), is_train=is_train, train_num_samples=5, batch_size=5)
    with pytest.raises(ShardDataError, match="5 x image cannot be decoded"):
        list(data.dataloader)


@pytest.mark.parametrize("members", [{"jpg": JPEG}, {"jpg": b"not a JPEG", "txt": TEXT}], ids=["lacking", "broken"])
def test_many_unusable_samples_among_usable_ones_are_no_reason_to_stop(
    tmp_path: Path, members: dict[str, bytes]
) -> None:
    bad = [[(f"a{i:03}.{name}", data) for name, data in members.items()] for i in range(PATIENCE + 5)]
    data = dataset(wrong(tmp_path, image_sample(0, 1), *bad), is_train=False)
    assert rows(data) == [(0, 0)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("is_train", [True, False], ids=["train", "val"])
def test_bad_samples_are_replaced_and_reported_with_their_keys(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, is_train: bool, workers: int
) -> None:
    pattern = write_shards(tmp_path, (6, 6), captions=1)
    good = image_sample(0, 1) + image_sample(1, 1) + image_sample(2, 1) + image_sample(3, 1)
    bad = [("bad1.png", image_bytes(5)[:40]), ("bad1.txt", TEXT), ("bad2.png", image_bytes(5))]
    (tmp_path / "s-000.tar").write_bytes(tar_bytes(bad[:2] + good + bad[2:]))
    data = dataset(pattern, is_train=is_train, workers=workers, batch_size=3)
    for epoch in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = batches(data, epoch)
        images = {image for batch in found for image, _ in batch}
        assert images == {0, 1, 2, 3, 6, 7, 8, 9, 10, 11}
        if is_train:
            assert [len(batch) for batch in found] == [3] * 4
        (report,) = [record.getMessage() for record in caplog.records if record.name == "msa_openclip.training.loader"]
        assert f"{pattern}: 2 problems" in report
        assert "s-000.tar: sample bad1: image cannot be decoded (" in report
        assert "s-000.tar: sample bad2: no captions among the members png" in report


def test_images_of_too_many_pixels_are_not_decoded() -> None:
    with pytest.raises(ValueError, match="2 x 3 pixels, --max-image-pixels is 5"):
        decode(image_bytes(1), 5)
    assert decode(image_bytes(1), 6).size == (2, 3)


def test_a_clean_epoch_reports_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows(dataset(write_shards(tmp_path, (6, 6)), batch_size=3))
    assert not caplog.records


def test_sizes_that_are_wrong_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pattern = write_shards(tmp_path, (6, 6), captions=1)
    (tmp_path / "sizes.json").write_text('{"s-000.tar": 6, "s-001.tar": 7}')
    assert len(rows(dataset(pattern, batch_size=3, is_train=False))) == 12
    assert "s-001.tar: sizes.json is wrong (it says 7 samples, the shard has 6)" in caplog.text


def test_too_few_shards_to_deal_out_say_what_to_set(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, (3, 3, 3), sizes=False)
    with pytest.raises(ShardDataError, match=r"3 shards for 4 readers .* Set --workers to at most 1, or build 4"):
        dataset(pattern, workers=2, world_size=2, train_num_samples=9)


def test_too_few_samples_for_a_batch_say_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(ShardDataError, match=r"9 samples do not fill one batch of --batch-size 16.*lower --batch-size"):
        dataset(write_shards(tmp_path, (3, 3, 3)), batch_size=16)


def test_an_unknown_number_of_samples_says_what_to_give(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, (3, 3), sizes=False)
    with pytest.raises(ShardDataError, match=r"no sizes\.json beside the shards.*Give --train-num-samples"):
        dataset(pattern)
    (tmp_path / "sizes.json").write_text('{"s-000.tar": 3}')
    with pytest.raises(ShardDataError, match=r"sizes\.json does not name 's-001\.tar'"):
        dataset(pattern)
    (tmp_path / "sizes.json").unlink()
    (tmp_path / "__len__").write_text("6")
    assert dataset(pattern, batch_size=3).dataloader.num_samples == 6


def test_a_missing_shard_is_named_at_once(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, (3, 3)).replace("001}", "002}")
    with pytest.raises(StreamError, match=r"s-002\.tar: no such file\. Check the name and the braces"):
        dataset(pattern, train_num_samples=6)


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 10**6) | st.integers(0, 99).map(tarfile.BLOCKSIZE.__mul__))
def test_a_shard_cut_off_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    whole = tar_bytes([member for number in range(3) for member in image_sample(number, 2)])
    end = len(whole.rstrip(b"\0"))
    end += -end % tarfile.BLOCKSIZE
    path = tmp_path_factory.getbasetemp() / "cut.tar"
    path.write_bytes(whole[: cut % (end + 1)])
    with pytest.raises(StreamError, match=r"cut\.tar: damaged, or not a tar .* shards verify"):
        list(read_share(Share(str(path)), Tally()))


def test_a_damaged_header_in_the_middle_is_refused(tmp_path: Path) -> None:
    damaged = bytearray(tar_bytes(image_sample(0, 2) + image_sample(1, 2)))
    damaged[damaged.index(b"k001.png") + 1] ^= 1
    path = tmp_path / "a.tar"
    path.write_bytes(damaged)
    with pytest.raises(StreamError, match="bad checksum at byte"):
        list(read_share(Share(str(path)), Tally()))


# ---- other models


def test_other_models_keep_the_loader_of_open_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = write_shards(tmp_path, (6, 6), captions=1)
    data = dataset(pattern, model="ViT-B-32", batch_size=3)
    pipeline = data.dataloader.pipeline[0].dataset
    assert isinstance(pipeline, wds.DataPipeline)
    assert not isinstance(dataset(pattern, batch_size=3).dataloader.pipeline[0].dataset, wds.DataPipeline)
    original = open_clip_train.data.get_wds_dataset.__wrapped__
    assert original.__module__ == "open_clip_train.data"
    args = arguments(pattern, model="ViT-B-32")
    monkeypatch.setattr(original, "__code__", (lambda *args, **kwargs: (args, kwargs)).__code__)
    monkeypatch.setattr(original, "__defaults__", None)
    called = open_clip_train.data.get_wds_dataset(args, "transform", is_train=True, epoch=3, tokenizer="t")
    assert called == ((args, "transform"), {"is_train": True, "epoch": 3, "tokenizer": "t"})


def test_other_models_read_by_our_loader_where_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = write_shards(tmp_path, (6, 6), captions=3)
    ours = batches(dataset(pattern, batch_size=3))
    monkeypatch.setenv("MSA_OPENCLIP_LOADER", "all")
    assert batches(dataset(pattern, model="ViT-B-32", batch_size=3)) == ours
    monkeypatch.setenv("MSA_OPENCLIP_LOADER", "yes")
    with pytest.raises(ValueError, match="MSA_OPENCLIP_LOADER: 'yes' is unknown; choose msa or all"):
        dataset(pattern, model="ViT-B-32")
