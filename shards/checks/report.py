"""What is in a set of shards: counts, classes, caption lengths, blank and doubled captions, doubled images, sizes."""

from __future__ import annotations

import json
import statistics
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import combinations
from typing import IO, Any, NamedTuple

from tqdm import tqdm

from .. import manifest
from ..readers import fields
from ..readers.tar_files import expand, read_metadata
from ..records import SPLITS, ShardError, clean_caption, folded_caption
from ..storage import store
from ..storage.tars import Member, images_of, read_member, samples
from .duplicates import MissingLibrary, equal_groups, near_groups, perceptual_hash

SHOWN = 12  # sample images of the report
REPEATED = {"captions": 0.1, "images": 0.01}
"""Shares of val or test from which on its repeating train is worth a warning."""


class Seen(NamedTuple):
    """One sample as it stands in a shard."""

    split: str
    image_id: str
    captions: list[str]
    images: list[bytes]
    """In order of date; one as a rule, none where the shard lacks it."""
    label: str | None
    size: str | None
    """WIDTHxHEIGHT, as its JSON has them."""
    checksum: str
    place: str
    """Shard and key, for messages."""


@dataclass
class _Tally:
    """What is counted of one split."""

    samples: int = 0
    images: set[str] = field(default_factory=set)
    captions: Counter[str] = field(default_factory=Counter)
    classes: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    blank: int = 0
    image_bytes: int = 0
    dates: set[int] = field(default_factory=set)
    """Numbers of images of a sample."""


class Report(NamedTuple):
    """The report as plain data, and some samples to look at."""

    content: dict[str, Any]
    shown: list[Seen]

    def json(self) -> str:
        """For programs."""
        return json.dumps(self.content, indent=1, ensure_ascii=False)


def report(
    folders: Sequence[str],
    *,
    near_bits: int | None = None,
    tokenizer: str | None = None,
    progress: bool = False,
) -> Report:
    """Read shards and sum up what is in them; of several folders also which images they share.

    Args:
        near_bits: also look for images whose perceptual hashes differ in at most this many of 64 bits (2 is careful).
        tokenizer: open_clip model name, whose tokenizer measures the captions; loads open_clip, hence torch.
    Raises:
        ShardError: no shards, no samples in them, a damaged sample, an unknown tokenizer, or the library for a
            question is not installed.
    """
    tallies: dict[str, _Tally] = defaultdict(_Tally)
    checksums: dict[str, str] = {}
    hashes: dict[str, int] = {}
    shown: list[Seen] = []
    for seen in tqdm(_samples(folders), desc="reading", unit=" samples", disable=not progress):
        tally = tallies[seen.split]
        _count(tally, seen)
        name = f"{seen.split}/{seen.image_id}"
        if name not in checksums:
            checksums[name] = seen.checksum
            if near_bits is not None:
                hashes[name] = _look(seen)
        if len(shown) < SHOWN and seen.image_id not in {other.image_id for other in shown}:
            shown.append(seen)
    measure = _token_counter(tokenizer) if tokenizer else None
    content: dict[str, Any] = {
        "folders": list(folders),
        "splits": {split: _sum_up(tallies[split], measure) for split in sorted(tallies, key=_split_order)},
        "rejected": _rejected(folders),
        "same_images": _sort_groups(equal_groups(checksums)),
        "shared": _shared(tallies, checksums),
    }
    if near_bits is not None:
        content["look_alikes"] = _sort_groups(near_groups(hashes, near_bits)) | {"max_bits": near_bits}
    return Report(content, shown)


def text(content: dict[str, Any]) -> str:
    """The report for people."""
    lines = [", ".join(content["folders"])]
    for split, row in content["splits"].items():
        words = row["caption_words"]
        lines += [
            f"{split}: {row['samples']:,} samples, {row['images']:,} images, {row['captions']:,} captions",
            f"  captions: {words['min']} to {words['max']} words, median {words['median']:g};"
            f" {row['unique_captions']:,} different ones, {row['blank_captions']} blank",
            f"  images: {row['image_mb']:.1f} MB; sizes {_shortened(row['sizes'])}"
            + (f"; {' or '.join(map(str, row['dates']))} dates of each place" if "dates" in row else ""),
        ]
        if tokens := row.get("caption_tokens"):
            lines.append(
                f"  tokens ({tokens['tokenizer']}): {tokens['min']} to {tokens['max']}, median {tokens['median']:g};"
                f" {tokens['cut_off_share']:.1%} are cut off at {tokens['context_length']}"
            )
        if row["classes"]:
            lines.append(f"  {len(row['classes'])} classes: {_shortened(row['classes'])}")
    for title, what in (("same_images", "the same image (checksum)"), ("look_alikes", "look-alike images (hash)")):
        if found := content.get(title):
            lines.append(f"{what}: {found['within']} groups within a split, {found['across']} across splits")
            lines += [f"  {' = '.join(group)}" for group in found["groups"][:5]]
    lines += [
        f"{row['split']} in {row['of']}: {row['captions']:,} captions ({row['captions_share']:.1%}),"
        f" {row['images']:,} images ({row['images_share']:.1%})"
        for row in content["shared"]
    ]
    lines += [f"warning: {warning}" for warning in warnings(content)]
    lines += [f"rejected, {reason}: {count}" for reason, count in content["rejected"].items()]
    return "\n".join(lines)


def warnings(content: dict[str, Any]) -> list[str]:
    """Where val or test repeats so much of train that its recalls tell little about new data."""
    return [
        f"{row[f'{what}_share']:.0%} of the {what} of {row['split']} stand in {row['of']}; {remedy}."
        for row in content["shared"]
        if row["of"].rpartition(":")[2] == "train" and row["split"].rpartition(":")[2] in ("val", "test")
        for what, remedy in (
            ("captions", "`msa-openclip eval --train-captions` rates the others apart"),
            ("images", "leave them out of one of the two"),
        )
        if row[f"{what}_share"] >= REPEATED[what]
    ]


def _shared(tallies: dict[str, _Tally], checksums: dict[str, str]) -> list[dict[str, Any]]:
    """For each pair of splits the captions (but for white space and case) and images of the later in the earlier."""
    captions = {split: Counter(map(folded_caption, tally.captions.elements())) for split, tally in tallies.items()}
    images: dict[str, list[str]] = defaultdict(list)
    for name, checksum in checksums.items():
        images[name.split("/", 1)[0]].append(checksum)
    rows = []
    for of, split in combinations(sorted(tallies, key=_split_order), 2):
        known = set(images[of])
        repeated = {
            "captions": sum(count for caption, count in captions[split].items() if caption in captions[of]),
            "images": sum(checksum in known for checksum in images[split]),
        }
        totals = {"captions": captions[split].total(), "images": len(images[split])}
        shares = {f"{what}_share": repeated[what] / max(1, totals[what]) for what in repeated}
        rows.append({"split": split, "of": of, **repeated, **shares})
    return rows


def _look(seen: Seen) -> int:
    """The perceptual hash of a sample; of several dates that of the first, for all show the same place."""
    try:
        return perceptual_hash(b"".join(seen.images[:1]))
    except MissingLibrary:
        raise
    except Exception as error:  # Pillow raises nearly everything for one broken file or another
        raise ShardError(
            f"{seen.place}: its image cannot be decoded ({type(error).__name__}: {error}), so that no look-alikes can"
            " be found. Leave out --look-alikes, or the image."
        ) from error


def _samples(folders: Sequence[str]) -> Iterator[Seen]:
    for folder in folders:
        prefix = f"{store.base_name(folder)}:" if len(folders) > 1 else ""
        found = False
        for url in expand(folder):
            with store.open_read(url) as file:
                try:
                    for key, members in samples(file):
                        found = True
                        yield _seen(file, url, key, {member.extension: member for member in members}, prefix)
                except (tarfile.TarError, KeyError, TypeError, ValueError) as error:
                    raise ShardError(f"{url}: damaged: {error}. `shards verify` finds the place.") from error
        if not found:
            raise ShardError(f"{folder}: no sample in its shards; there is nothing to report.")


def _seen(file: IO[bytes], url: str, key: str, parts: dict[str, Member], prefix: str) -> Seen:
    metadata = read_metadata(file, parts.get("json"))
    text = read_member(file, parts["txt"]).decode() if "txt" in parts else ""
    captions = fields.captions(metadata.get("captions"), f"{key}.json: captions") or text.split("\n")
    images = [read_member(file, image) for image in images_of(parts)]
    names = ("split", "image_id", "class", "sha256", "width", "height")
    split, image_id, label, checksum, width, height = (
        fields.label(metadata.get(name), f"{key}.json: {name}") for name in names
    )
    return Seen(
        split=prefix + (split or "unknown"),
        image_id=image_id or key,
        captions=captions,
        images=images,
        label=label,
        size=f"{width}x{height}" if width and height else None,
        checksum=checksum or str(hash(b"".join(images))),
        place=f"{url}:{key}",
    )


def _count(tally: _Tally, seen: Seen) -> None:
    tally.samples += 1
    tally.captions.update(clean_caption(caption) for caption in seen.captions)
    tally.blank += sum(not caption.strip() for caption in seen.captions)
    if seen.image_id in tally.images:
        return
    tally.images.add(seen.image_id)
    tally.image_bytes += sum(map(len, seen.images))
    tally.dates.add(len(seen.images))
    if seen.label:
        tally.classes[seen.label] += 1
    if seen.size:
        tally.sizes[seen.size] += 1


def _sum_up(tally: _Tally, measure: Callable[[list[str]], dict[str, Any]] | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "samples": tally.samples,
        "images": len(tally.images),
        "captions": tally.captions.total(),
        "unique_captions": len(tally.captions),
        "blank_captions": tally.blank,
        "caption_words": _spread(_lengths(tally.captions)),
        "classes": dict(tally.classes.most_common()),
        "sizes": dict(tally.sizes.most_common()),
        "image_mb": tally.image_bytes / 1e6,
    }
    if tally.dates - {0, 1}:
        row["dates"] = sorted(tally.dates)
    if measure:
        row["caption_tokens"] = measure(list(tally.captions.elements()))
    return row


def _lengths(captions: Counter[str]) -> Counter[int]:
    lengths: Counter[int] = Counter()
    for caption, count in captions.items():
        lengths[len(caption.split())] += count
    return lengths


def _spread(lengths: Counter[int]) -> dict[str, Any]:
    values = sorted(lengths.elements())
    return {
        "min": values[0],
        "median": statistics.median(values),
        "mean": statistics.fmean(values),
        "max": values[-1],
        "histogram": {str(length): lengths[length] for length in sorted(lengths)},
    }


def _token_counter(model: str) -> Callable[[list[str]], dict[str, Any]]:
    # Only where tokens are asked for: what is above the builder, and torch.  Nothing there imports this room.
    import open_clip

    from ...data.tokenizers import load_tokenizer

    if ":" not in model and model not in open_clip.list_models():  # open_clip would take its default tokenizer instead
        close = ", ".join(get_close_matches(model, open_clip.list_models())) or "see open_clip.list_models()"
        raise ShardError(f"tokenizer: open_clip has no model {model!r}; {close}.")
    try:
        tokenizer = load_tokenizer(model)
    except Exception as error:  # open_clip raises whatever its configs and hubs do
        raise ShardError(f"tokenizer: open_clip has none for {model!r} ({error}).") from error
    context = int(tokenizer.context_length)
    pad = getattr(getattr(tokenizer, "tokenizer", None), "pad_token_id", None) or 0

    def measure(captions: list[str]) -> dict[str, Any]:
        lengths: Counter[int] = Counter()
        for start in range(0, len(captions), 1000):
            ids = tokenizer(captions[start : start + 1000], context_length=8 * context)
            lengths.update((ids != pad).sum(dim=1).tolist())
        cut = sum(count for length, count in lengths.items() if length > context)
        metadata = {"tokenizer": model, "context_length": context, "cut_off_share": cut / max(1, lengths.total())}
        return _spread(lengths) | metadata

    return measure


def _rejected(folders: Sequence[str]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for folder in folders:
        if store.exists(store.join(folder, "manifest.json")):
            total.update(manifest.read(folder)["rejected"])
    return dict(total)


def _sort_groups(groups: list[list[str]]) -> dict[str, Any]:
    across = [group for group in groups if len({name.split("/", 1)[0] for name in group}) > 1]
    return {"within": len(groups) - len(across), "across": len(across), "groups": across + [
        group for group in groups if group not in across
    ]}  # fmt: skip


def _split_order(name: str) -> tuple[str, int]:
    folder, _, split = name.rpartition(":")
    return folder, SPLITS.index(split) if split in SPLITS else len(SPLITS)


def _shortened(counts: dict[str, int], most: int = 6) -> str:
    shown = ", ".join(f"{name} {count:,}" for name, count in list(counts.items())[:most])
    return f"{shown}, and {len(counts) - most} more" if len(counts) > most else shown
