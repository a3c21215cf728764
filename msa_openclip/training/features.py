"""Shards of features: outputs of locked towers in place of pixels, with a line of JSON that says whose they are.

    FOLDER/features.json        model, towers, augmentation, precision, and the shards that are whole; written first
    FOLDER/NAME.tar             one for each shard of images, under its name, with the same samples in the same order
        KEY.txt                 the captions, a line each
        KEY.features            safetensors of one sample, the fields of `pack`
        KEY.json                what the shard of images says of it: the scene class
    FOLDER/sizes.json           written last

They are WebDataset shards, so the loader reads them as it reads images: from any store, by any number of readers,
each sample once an epoch.  Shapes: V views, K captions of an image, L token ids, N attended tokens, P and C widths.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from ..data.small_files import parse_json
from ..data.streams import StreamError, read_if_there
from ..model.architecture import token_mark
from ..model.cached import CachedImages, CachedTexts, FeatureError, Source
from ..shards.storage import store

HEADER = "features.json"
MEMBER = "features"
"""Extension of the samples."""
FORMAT = 2  # 1 noted neither configuration nor tokenizer, nor the content of the shards


@dataclass(frozen=True, kw_only=True)
class Header:
    """features.json."""

    model: str
    """What the model was loaded as."""
    towers: dict[str, Any]
    """`describe_towers` of the model."""
    widths: list[int]
    """P of the image tower, then C_s of each scale."""
    dtype: str
    views: int
    """Augmented views of each image; 0: one, not augmented."""
    aug_cfg: dict[str, Any]
    context_length: int
    """L."""
    tokenizer: str
    """`token_mark` of the tokenizer."""
    source: list[str]
    """The shards of images."""
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of those that are whole: `samples`; `tokens`, the N of its longest caption; `bytes`; `source`, the `content_mark`
    of the shard of images."""

    def settings(self) -> dict[str, Any]:
        """All but the progress, as JSON has it: what must not change between two calls that write the same features."""
        settings: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        del settings["shards"]
        return settings

    def write(self, folder: str) -> None:
        """Put down features.json in one step."""
        content = json.dumps({"format": FORMAT, **asdict(self)}, indent=1)
        store.write_bytes(store.join(folder, HEADER), content.encode())


def read_header(folder: str) -> Header | None:
    """The header of a folder of features; None if the folder is none.

    Raises:
        FeatureError: it is damaged, or of another format.
    """
    path = store.join(folder, HEADER)
    try:
        content = read_if_there(path)
    except StreamError:
        return None  # whoever reads the shards of this store next meets the same failure, and names the shard
    if content is None:
        return None
    try:
        fields = parse_json(content, path)
        version = fields.pop("format")
        if version == FORMAT:
            return Header(**fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FeatureError(f"{path}: damaged ({error}); delete the folder and make the features again.") from error
    raise FeatureError(f"{path}: format {version}, this version reads {FORMAT}; make the features again.")


def pack(images: Tensor, ids: Tensor, features: Tensor, tokens: Sequence[Tensor]) -> bytes:
    """One sample as bytes.

    Args:
        images: (V, P + sum of C_s) outputs of the image tower, side by side.
        ids: (K, L) token ids.
        features: (K, P) outputs of the text tower.
        tokens: K runs (N, C) of attended tokens.
    """
    lengths = torch.tensor([len(run) for run in tokens], dtype=torch.int32)
    joined = torch.cat(list(tokens))
    return save({"images": images, "ids": ids.int(), "features": features, "tokens": joined, "lengths": lengths})


@dataclass(frozen=True)
class FeatureRows:
    """Turns samples of feature shards into batches that `MSACLIP.forward` takes in training."""

    widths: list[int]
    longest: int
    """N of all batches: ranks and micro-batches join theirs."""
    source: Source

    members = (MEMBER,)
    """Extensions of what stands in place of the image."""

    def decode(self, sample: Mapping[str, Any]) -> dict[str, Tensor]:
        """The fields of `pack`."""
        return load(sample["image"])

    def row(self, fields: dict[str, Tensor], captions: list[str], caption: str, draw: random.Random) -> tuple[Any, ...]:
        """One view of the image and one of its captions, padded to the longest."""
        number = captions.index(caption)
        begin = int(fields["lengths"][:number].sum())
        run = fields["tokens"][begin : begin + int(fields["lengths"][number])]
        tokens = run.new_zeros(self.longest, run.shape[1])
        tokens[: len(run)] = run
        view = draw.randrange(len(fields["images"]))
        return fields["images"][view], fields["ids"][number], fields["features"][number], tokens, len(run)

    def collate(self, rows: list[tuple[Any, ...]]) -> tuple[CachedImages, CachedTexts]:
        """Rows -> one batch, in float32."""
        images, ids, features, tokens = (torch.stack(column) for column in list(zip(*rows, strict=True))[:4])
        lengths = torch.tensor([row[4] for row in rows])
        feature, *pooled = torch.split(images.float(), self.widths, dim=1)
        mask = torch.arange(self.longest) < lengths[:, None]
        texts = CachedTexts(ids.long(), features.float(), tokens.float(), mask)
        return CachedImages(feature, tuple(pooled), self.source), texts


def feature_rows(urls: Sequence[str], args: Any, tokenizer: Any) -> FeatureRows | None:
    """How to read shards of features as the trainer's `args` want it; None if the shards are none.

    Raises:
        FeatureError: features and other shards, or those of several models, are mixed; some are not finished; or the
            towers would learn.
    """
    folders = list(dict.fromkeys(store.parent(url) for url in urls if not url.startswith("pipe:")))
    headers = {folder: read_header(folder) for folder in folders}
    found = {folder: header for folder, header in headers.items() if header is not None}
    if not found:
        return None
    first, header = next(iter(found.items()))
    for folder in folders:
        other = found.get(folder)
        if other is None or (other.towers, other.context_length) != (header.towers, header.context_length):
            raise FeatureError(f"--train-data: {folder} does not hold features of the same model as {first}.")
    for url in urls:
        if store.base_name(url) not in found[store.parent(url)].shards:
            raise FeatureError(f"{url}: not finished; give the command `msa-openclip features ...` again.")
    _require_locked_towers(args, first)
    length = getattr(tokenizer, "context_length", header.context_length)
    if length != header.context_length:
        raise FeatureError(f"{first}: made for {header.context_length} token ids a text, the run has {length}.")
    if tokenizer is not None and token_mark(tokenizer) != header.tokenizer:
        raise FeatureError(
            f"{first}: made with another tokenizer than the run's, or other options of it (text_cfg.tokenizer_kwargs). "
            "Train the model that the features were made with, or make them again."
        )
    longest = max(shard["tokens"] for other in found.values() for shard in other.shards.values())
    return FeatureRows(header.widths, longest, Source(first, json.dumps(header.towers)))


def _require_locked_towers(args: Any, folder: str) -> None:
    wanted = ("lock_image", "lock_text", "lock_text_freeze_layer_norm")
    lacking = [f"--{name.replace('_', '-')}" for name in wanted if not getattr(args, name)]
    if lacking:
        raise FeatureError(f"{folder} holds features of locked towers, which cannot learn; add {' '.join(lacking)}.")
    for name in ("lock_image_unlocked_groups", "lock_text_unlocked_layers"):
        if getattr(args, name):
            raise FeatureError(
                f"{folder} holds features of towers locked as a whole; leave out --{name.replace('_', '-')}, "
                "or train on the images."
            )
