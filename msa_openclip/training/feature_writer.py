"""Writes shards of features: runs the locked towers once over shards of images and captions."""

from __future__ import annotations

import io
import json
import logging
import random
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..data.pixels import batch_spans
from ..data.streams import content_mark
from ..evaluation.loading import LoadedModel
from ..model.architecture import token_mark
from ..model.cached import FeatureError, describe_towers
from ..shards import manifest
from ..shards.storage import store
from ..shards.storage.locking import one_writer
from .feature_options import FeatureOptions
from .features import HEADER, MEMBER, Header, pack, read_header
from .samples import Sample, Tally, decode, read_share
from .shares import Share

_log = logging.getLogger(__name__)


def write_features(model: LoadedModel, shards: Sequence[str], folder: str, options: FeatureOptions) -> int:
    """Write the features of shards, a shard of features for each; returns how many were new.

    Interrupted, the same call goes on with the shard where it stopped.  A shard whose content has changed since is
    written again, except behind a `pipe:` command, which is not run to find out.

    Example:
        >>> write_features(load("MSA-ViT-B=epoch_9.pt"), ["train-000000.tar"], "features", FeatureOptions())
        1

    Raises:
        FeatureError: the folder holds other features, the model has no locked part to cache, or float16 cannot hold
            its outputs; or a file that is not of features would be overwritten, of the source or of another folder.
        StreamError, ShardDataError: a shard cannot be read, or holds nothing that can be used.
        BeingWritten: another process is writing to the folder.
    """
    names = [store.base_name(url) for url in shards]
    if len(set(names)) != len(names):
        raise FeatureError(f"{folder}: two of the {len(names)} shards have one name; write them to two folders.")
    _require_apart(shards, folder)
    store.make_folder(folder)
    new = 0
    with one_writer(folder):
        header = _opened(model, list(shards), folder, options)
        for url, name in zip(shards, names, strict=True):
            target, source = store.join(folder, name), content_mark(url)
            if _is_written(header.shards.get(name), target, source):
                continue
            header.shards[name] = {**_write_shard(model, url, target, options), "source": source}
            header.write(folder)
            new += 1
        _write_sizes(header, folder)
    return new


def _require_apart(shards: Sequence[str], folder: str) -> None:
    """Refuse to write where the source lies: features have the names of the shards that they are made of."""
    files = (url for url in shards if not url.startswith("pipe:"))  # a command names no place
    inside = next((url for url in files if store.overlap(url, folder)), None)
    if inside is not None:
        raise FeatureError(
            f"{folder}: the target and the source {inside} are one, or one lies inside the other, and the source would "
            "be overwritten. Choose another folder for the features."
        )


def _require_free(folder: str, shards: Sequence[str]) -> None:
    """Refuse a folder without features.json that has files of the names to be written, or is one of a shard build."""
    reserved = {*map(store.base_name, shards), *manifest.FILES}
    found = sorted(reserved.intersection(store.names(folder)))
    if found:
        raise FeatureError(
            f"{folder}: has {found[0]} but no {HEADER}, so what lies there is not of features, and would be "
            "overwritten. Choose another folder."
        )


def _is_written(known: Mapping[str, Any] | None, target: str, source: str) -> bool:
    """Whether the features of a shard are there, whole, and those of its present content."""
    if known is None:
        return False
    if known.get("source") != source:
        _log.warning("%s: made of a shard that has been replaced since; it is written again.", target)
        return False
    return store.exists(target) and store.size(target) == known.get("bytes")


def _opened(model: LoadedModel, shards: list[str], folder: str, options: FeatureOptions) -> Header:
    """The header of the folder: written before any features, or, where there is one, compared with what is wanted."""
    inner = model.scorer.model
    blank = Image.new("RGB", (8, 8))
    outputs = model.scorer.locked_images(model.preprocess(blank)[None])
    wanted = Header(
        model=model.spec,
        towers=describe_towers(inner),
        widths=[part.shape[1] for part in outputs],
        dtype=options.dtype,
        views=options.views,
        aug_cfg=dict(options.aug_cfg or {}) if options.views else {},
        context_length=model.tokenizer(["a"]).shape[1],
        tokenizer=token_mark(model.tokenizer),
        source=shards,
    )
    known = read_header(folder)
    if known is None:
        _require_free(folder, shards)
        wanted.write(folder)
        return wanted
    there, asked = known.settings(), wanted.settings()
    changed = [key for key in there if key != "model" and there[key] != asked[key]]
    if changed:
        key = changed[0]
        shown = "other weights or settings" if key == "towers" else f"{there[key]}, now {asked[key]}"
        raise FeatureError(
            f"{folder}: holds features made with {key}: {shown}. Give the same options as then, or another folder."
        )
    return known


def _write_shard(model: LoadedModel, url: str, target: str, options: FeatureOptions) -> dict[str, int]:
    tally = Tally()
    samples = list(read_share(Share(url), tally, metadata=True))
    texts = _encode_captions(model, samples, url, options)
    images = _encode_images(model, samples, tally, url, options)
    written = 0
    with store.atomic_write(target) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for sample, views in images:
            ids, features, tokens = zip(*(texts[caption] for caption in sample["captions"]), strict=True)
            packed = pack(views, torch.stack(ids), torch.stack(features), tokens)
            _add(tar, f"{sample['__key__']}.txt", "\n".join(sample["captions"]).encode())
            _add(tar, f"{sample['__key__']}.{MEMBER}", packed)
            if "metadata" in sample:
                _add(tar, f"{sample['__key__']}.json", sample["metadata"])
            written += 1
    if tally.examples:
        _log.warning("%s: %d samples left out:\n  %s", url, tally.problems, tally)
    if not written:
        raise tally.nothing_usable(url)
    return {
        "samples": written,
        "tokens": max(len(tokens) for _, _, tokens in texts.values()),
        "bytes": store.size(target),
    }


Text = tuple[Tensor, Tensor, Tensor]
"""Token ids (L,), output of the text tower (P,), attended tokens (N, C)."""


def _encode_captions(
    model: LoadedModel, samples: Sequence[Sample], url: str, options: FeatureOptions
) -> dict[str, Text]:
    """Each distinct caption of a shard once; those of similar length together, which saves padding."""
    captions = sorted(
        {caption for sample in samples for caption in sample["captions"]}, key=lambda text: (len(text), text)
    )
    texts: dict[str, Text] = {}
    for span in batch_spans(len(captions), options.batch_size):
        ids = model.tokenizer(captions[span.start : span.stop])
        features, runs = model.scorer.locked_texts(ids)
        features = _stored(features, url, options)
        for number, row, feature, run in zip(span, ids, features, runs, strict=True):
            texts[captions[number]] = row, feature, _stored(run, url, options)
    return texts


def _encode_images(
    model: LoadedModel, samples: Sequence[Sample], tally: Tally, url: str, options: FeatureOptions
) -> Iterator[tuple[Sample, Tensor]]:
    """Samples with the outputs (V, P + sum of C_s) of the image tower; those that do not decode are left out."""
    transform = options.augment if options.views and options.augment else model.preprocess
    views = _Views(samples, transform, max(1, options.views))
    loader = DataLoader(
        views, batch_size=max(1, options.batch_size // views.count), collate_fn=list, num_workers=options.workers
    )
    everyone = iter(samples)
    bar = tqdm(loader, desc=store.base_name(url), unit=" batches", leave=False, disable=not options.progress)
    for batch in bar:
        decoded = [(next(everyone), pixels) for pixels in batch]
        for sample, pixels in decoded:
            if isinstance(pixels, str):
                tally.reject(sample, "image cannot be decoded", pixels, passed=tally.usable)
        whole = [(sample, pixels) for sample, pixels in decoded if not isinstance(pixels, str)]
        if whole:
            outputs = model.scorer.locked_images(torch.cat([pixels for _, pixels in whole]))
            joined = _stored(torch.cat(outputs, dim=1), url, options)
            tally.usable += len(whole)
            yield from zip((sample for sample, _ in whole), torch.split(joined, views.count), strict=True)


class _Views(Dataset[Any]):
    """The views (V, 3, h, w) of each sample; a text that says why, where the image does not decode."""

    def __init__(self, samples: Sequence[Sample], transform: Callable[[Image.Image], Tensor], count: int) -> None:
        self.samples, self.transform, self.count = samples, transform, count

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tensor | str:
        sample = self.samples[index]
        try:
            image = decode(sample["image"])
        except Exception as error:  # Pillow raises nearly everything for one broken file or another
            return f"{type(error).__name__}: {error}"
        state = random.getstate()
        with torch.random.fork_rng(devices=[]):  # the same views whatever came before, and however many workers
            random.seed(sample["__key__"])
            torch.manual_seed(random.getrandbits(63))
            views = torch.stack([self.transform(image) for _ in range(self.count)])
        random.setstate(state)
        return views


def _stored(values: Tensor, url: str, options: FeatureOptions) -> Tensor:
    stored = values.cpu().to(getattr(torch, options.dtype))
    if not torch.isfinite(stored).all():
        raise FeatureError(f"{url}: features that {options.dtype} cannot hold; use --dtype float32.")
    return stored.contiguous()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _write_sizes(header: Header, folder: str) -> None:
    sizes = {name: header.shards[name]["samples"] for name in map(store.base_name, header.source)}
    store.write_bytes(store.join(folder, "sizes.json"), json.dumps(sizes, indent=1).encode())
