"""Training and validation on shards in `open_clip_train.main`: what `get_wds_dataset` returns for MSA models.

Instead of open_clip's own, because that draws no caption of several, repeats and skips samples where shards and workers
do not match, and waits forever for data that never comes.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from typing import Any

import torch
import webdataset as wds
from open_clip_train.data import DataInfo, ResampledShards2, SharedEpoch, detshuffle2, expand_urls, get_dataset_size
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.filters import default_collation_fn

from ..data.pixels import preprocessed
from ..model.labelled import LabelledTexts
from ..shards.storage.tars import IMAGE_MEMBERS
from .features import FeatureRows, feature_rows
from .samples import Sample, Tally, class_of, decode, draw_caption, look_at_first_sample, read_share
from .shares import LoaderWorker, ShardDataError, Share, part_of, sample_range, shard_sizes, shuffled, whole_shards

_SHUFFLE = {"bufsize": 5000, "initial": 1000}  # encoded samples in memory, as in open_clip

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ShardBatches(IterableDataset[Any]):
    """Batches of one reader: (images (B, 3, h, w), token ids (B, L)), and at the end of an epoch its `Tally`.

    Of shards of features (CachedImages, CachedTexts) instead.

    In training each sample is an image with one of its captions, in validation there is a row for each caption.  Where
    `sizes` is known, the readers of an epoch split the samples, else the shards.
    """

    urls: list[str]
    sizes: list[int] | None
    resampled: ResampledShards2 | None
    batches: int
    """Of this rank in an epoch, in training; split among its workers."""
    batch_size: int
    is_train: bool
    seed: int
    epoch: SharedEpoch
    rank: int
    ranks: int
    preprocess: Callable[[Any], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    max_pixels: int | None = None
    """Larger images are left out."""
    reorder: Callable[[Iterable[Sample]], Iterable[Sample]] | None = None
    """In training: of samples with token ids under `text`, still encoded."""
    features: FeatureRows | None = None
    """How to read shards of features; None: they hold images."""
    classes: bool = False
    """In training: texts come with the scene classes of their images, as `LabelledTexts`."""
    dates: int = 1
    """Images of a sample; with more than one they come as (B, dates, 3, h, w)."""

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        reader = (
            LoaderWorker(self.rank, self.ranks, worker, workers)
            if self.is_train
            else LoaderWorker(0, 1, worker, workers)
        )
        tally = Tally()
        rows = self._training_rows(reader, tally) if self.is_train else self._validation_rows(reader, tally)
        collate: dict[str, Any] = {"collation_fn": self.features.collate} if self.features else {}
        if self.classes:
            collate = {"collation_fn": self._with_classes}
        yield from wds.batched(self.batch_size, partial=True, **collate)(rows)
        yield tally

    def shares(self, reader: LoaderWorker) -> Iterator[Share]:
        """What `reader` reads in an epoch; in training, with sizes, as many samples as its batches take, none twice."""
        urls, sizes = self.urls, self.sizes
        if self.is_train:
            urls, sizes = shuffled(urls, sizes, self.seed + self.epoch.get_value())
        if sizes is None:
            return whole_shards(urls, reader)
        if not self.is_train:
            return sample_range(urls, sizes, *part_of(sum(sizes), reader.worker, reader.workers))
        first, last = part_of(self.batches, reader.worker, reader.workers)
        begin, end = ((reader.rank * self.batches + batch) * self.batch_size for batch in (first, last))
        return sample_range(urls, sizes, begin, min(end, begin + sum(sizes)))

    def _training_rows(self, reader: LoaderWorker, tally: Tally) -> Iterator[tuple[Any, ...]]:
        """As many as fill the batches of `reader`; where samples do not suffice, the first come again."""
        begin, end = part_of(self.batches, reader.worker, reader.workers)
        missing, epoch = (end - begin) * self.batch_size, self.epoch.get_value()
        shuffle = detshuffle2(**_SHUFFLE, seed=self.seed, epoch=self.epoch)
        passes = self._passes(reader)
        first: list[Sample] = []  # kept, since less than a batch is missing as a rule: no shard is read twice for it
        while missing:
            enough = missing <= len(first)
            samples = tuple(first) if enough else shuffle.run(self._samples(next(passes), tally))
            for sample in self._with_text(samples, epoch):
                image = self._image(sample, tally)
                if image is None:
                    continue
                if self.features:
                    draw = random.Random(f"view/{self.seed}/{epoch}/{sample['__key__']}")
                    row = self.features.row(image, sample["captions"], sample["caption"], draw)
                else:
                    row = image, sample["text"]
                yield (*row, class_of(sample)) if self.classes else row
                missing -= 1
                if not missing:
                    return
                if len(first) < self.batch_size:
                    first.append(sample)
            if not tally.usable:
                raise tally.nothing_usable(f"{self.urls[0]} and {len(self.urls) - 1} more shards")

    def _with_classes(self, rows: list[tuple[Any, ...]]) -> tuple[Any, LabelledTexts]:
        """Rows that end in a class -> one batch."""
        collate = self.features.collate if self.features else default_collation_fn
        images, texts = collate([row[:-1] for row in rows])
        return images, LabelledTexts(texts, torch.tensor([row[-1] for row in rows]))

    def _with_text(self, samples: Iterable[Sample], epoch: int) -> Iterable[Sample]:
        """Samples with the token ids of the caption that is theirs in this epoch, in the order of `reorder`."""

        def worded(sample: Sample) -> Sample:
            caption = draw_caption(sample["captions"], sample["__key__"], self.seed, epoch)
            if self.features:  # they hold the token ids
                return {**sample, "caption": caption}
            return {**sample, "text": self.tokenizer([caption])[0]}

        with_text = map(worded, samples)
        return with_text if self.reorder is None else self.reorder(with_text)

    def _passes(self, reader: LoaderWorker) -> Iterator[Iterator[Share]]:
        if self.resampled is not None:
            while True:
                yield (Share(shard["url"]) for shard in self.resampled)
        while True:
            yield self.shares(reader)

    def _validation_rows(self, reader: LoaderWorker, tally: Tally) -> Iterator[tuple[Tensor, Tensor]]:
        for sample in self._samples(self.shares(reader), tally):
            image = self._image(sample, tally)
            if image is not None:
                yield from zip(repeat(image), self.tokenizer(sample["captions"]), strict=False)

    def _samples(self, shares: Iterator[Share], tally: Tally) -> Iterator[Sample]:
        members = self.features.members if self.features else IMAGE_MEMBERS
        how: dict[str, Any] = {"members": members, "metadata": self.classes, "dates": self.dates}
        return chain.from_iterable(read_share(share, tally, **how) for share in shares)

    def _image(self, sample: Sample, tally: Tally) -> Any:
        """The pixels of a sample, or its features; None if they cannot be decoded."""
        try:
            if self.features:
                image: Any = self.features.decode(sample)
            else:
                encoded = sample["image"] if self.dates > 1 else [sample["image"]]
                image = preprocessed([decode(data, self.max_pixels) for data in encoded], self.preprocess)
        except Exception as error:  # Pillow raises nearly everything for one broken file or another
            detail = f"{type(error).__name__}: {error}"
            tally.reject(sample, "image cannot be decoded", detail, passed=tally.usable)
            return None
        tally.usable += 1
        return image


def get_wds_dataset(
    args: Any,
    preprocess_img: Callable[[Any], Tensor],
    is_train: bool,
    epoch: int = 0,
    floor: bool = False,
    tokenizer: Any = None,
    batches: Callable[[Tensor, Tensor], Any] = lambda images, texts: (images, texts),
    reorder: Callable[[SharedEpoch], Callable[[Iterable[Sample]], Iterable[Sample]] | None] = lambda epoch: None,
    classes: bool = False,
    dates: int = 1,
) -> DataInfo:
    """As open_clip_train.data's function of this name, for shards in the `image` and the `pair` layout.

    On top of its arguments: `batches` makes what the trainer takes of images and token ids, `reorder`, given the
    epoch, says how training orders samples that have been read and worded; with `classes` training texts are
    `LabelledTexts`; `dates` is `msa_cfg.dates` of the model.

    Training promises, where every shard is named by a sizes.json beside it: in an epoch each sample once, and fewer
    than one global batch of them twice, for any number of shards, workers and ranks; an image that cannot be decoded is
    replaced by another.  Without sizes, shards are dealt out whole and the readers repeat theirs to fill equal numbers
    of batches, as open_clip does.  Validation promises each caption once, with its image.

    Raises:
        ShardDataError: the shards do not fit the run, or hold nothing that can be used.
        StreamError: a shard cannot be read.
    """
    pattern = args.train_data if is_train else args.val_data
    urls, _ = expand_urls(pattern)
    resampled = bool(is_train and getattr(args, "dataset_resampled", False))
    if is_train and args.train_data_upsampling_factors is not None and not resampled:
        raise ShardDataError("--train-data-upsampling-factors weighs shards drawn by --dataset-resampled; give both.")
    features = feature_rows(urls, args, tokenizer)
    if features and not is_train:
        raise ShardDataError(f"{pattern}: features serve training; give --val-data the shards of images to rank.")
    if features and dates > 1:
        raise ShardDataError(f"{pattern}: features are of one date, the model takes {dates} (msa_cfg.dates).")
    look_at_first_sample(urls, features.members if features else IMAGE_MEMBERS, dates)
    sizes = shard_sizes(urls)
    shared_epoch = SharedEpoch(epoch=epoch)
    if is_train:
        samples = args.train_num_samples or _count(pattern, sizes)
        count = _training_batches(args, samples, None if resampled else sizes, floor)
        if not resampled:
            _require_enough(args, urls, sizes)
        samples = count * args.batch_size * args.world_size
    else:
        samples = args.val_num_samples or 0
        count = math.ceil(samples / args.batch_size)
    dataset = ShardBatches(
        urls=urls,
        sizes=sizes,
        resampled=_resampled(args, pattern, shared_epoch) if resampled else None,
        batches=count,
        batch_size=args.batch_size,
        is_train=is_train,
        seed=args.seed,
        epoch=shared_epoch,
        rank=args.rank,
        ranks=args.world_size,
        preprocess=preprocess_img,
        tokenizer=tokenizer,
        max_pixels=getattr(args, "max_image_pixels", None) or None,
        reorder=reorder(shared_epoch) if is_train and not features else None,  # features are of one length
        features=features,
        classes=classes and is_train,
        dates=dates,
    )
    loader = wds.WebLoader(
        dataset, batch_size=None, shuffle=False, num_workers=args.workers, persistent_workers=args.workers > 0
    )
    loader.append(partial(_report, pattern=pattern, batches=batches))
    loader.num_batches, loader.num_samples = count, samples
    return DataInfo(dataloader=loader, shared_epoch=shared_epoch)


def _count(pattern: str, sizes: list[int] | None) -> int:
    samples = sum(sizes) if sizes is not None else _count_as_open_clip(pattern)
    if not samples:
        raise ShardDataError(
            f"{pattern}: no sizes.json beside the shards says how many samples there are. Give --train-num-samples, "
            "or build the shards with `msa-openclip shards build`, which writes it."
        )
    return samples


def _count_as_open_clip(pattern: str) -> int | None:
    try:
        samples: int | None = get_dataset_size(pattern)[0]
    except KeyError as error:
        raise ShardDataError(
            f"{pattern}: sizes.json does not name {error}. Give --train-num-samples, or correct sizes.json."
        ) from error
    return samples


def _training_batches(args: Any, samples: int, sizes: list[int] | None, floor: bool) -> int:
    """Batches of one rank in an epoch."""
    rounded: Callable[[float], int] = math.floor if floor else math.ceil
    batches = rounded(samples / (args.batch_size * args.world_size))
    if sizes is None:  # the workers of a rank get equal numbers, as their numbers of samples are unknown
        workers = max(1, args.workers)
        batches = rounded(batches / workers) * workers
    if not batches or (sizes is not None and sum(sizes) < args.batch_size):
        raise ShardDataError(
            f"{args.train_data}: {samples} samples do not fill one batch of --batch-size {args.batch_size} on each of "
            f"{args.world_size} ranks; lower --batch-size."
        )
    return batches


def _require_enough(args: Any, urls: list[str], sizes: list[int] | None) -> None:
    readers = max(1, args.workers) * args.world_size
    if sizes is None and len(urls) < readers:
        raise ShardDataError(
            f"{args.train_data}: {len(urls)} shards for {readers} readers (--workers {args.workers} on "
            f"{args.world_size} ranks), and no sizes.json by which to split them. Set --workers to at most "
            f"{len(urls) // args.world_size}, or build {readers} shards or more."
        )


def _resampled(args: Any, pattern: str, epoch: SharedEpoch) -> ResampledShards2:
    return ResampledShards2(pattern, weights=args.train_data_upsampling_factors, deterministic=True, epoch=epoch)


def require_one_caption_a_sample(args: Any, is_train: bool, option: str) -> None:
    """Refuse shards whose captions open_clip's own pipeline would take for one, where `option` asks for that pipeline.

    Raises:
        ShardDataError: the first sample has several captions.
    """
    if getattr(args, "json_text_key", None) or getattr(args, "text_key", "txt") != "txt":
        return  # the captions are elsewhere
    pattern = args.train_data if is_train else args.val_data
    urls, _ = expand_urls(pattern)
    captions = look_at_first_sample(urls)["captions"]
    if len(captions) > 1:
        raise ShardDataError(
            f"{pattern}: samples have several captions (the first has {len(captions)}), and with {option} open_clip "
            "reads the shards itself, which takes all lines of KEY.txt for one caption. Build them with --layout pair."
        )


def _report(items: Iterator[Any], pattern: str, batches: Callable[[Tensor, Tensor], Any]) -> Iterator[Any]:
    """Pass on what `batches` makes of images and token ids; at the end of an epoch log what could not be used, by all
    workers of this rank.

    Raises:
        ShardDataError: nothing could be used.
    """
    tally = Tally()
    for item in items:
        if isinstance(item, Tally):
            tally.add(item)
        else:
            yield batches(*item)
    if not tally.usable:
        raise tally.nothing_usable(pattern)
    if tally.examples:
        _log.warning("%s: %d problems with samples, which were left out:\n  %s", pattern, tally.problems, tally)
