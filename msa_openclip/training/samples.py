"""Shard -> samples fit for training: KEY.txt with captions, a line each, and KEY.jpg, .jpeg, .png or .webp.

A sample of several dates has KEY.0.jpg, KEY.1.jpg, ... in place of KEY.jpg.

What cannot be used is counted, with its key and the reason, in a `Tally`; nothing is dropped in silence.
"""

from __future__ import annotations

import random
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from open_clip_train.data import group_by_keys_nothrow
from PIL import Image
from webdataset.tariterators import base_plus_ext

from ..data.small_files import FileProblem, parse_json
from ..data.streams import StreamError, open_shard
from ..model.labelled import class_number
from ..shards.imagery.prepare import open_image
from ..shards.output import printable
from ..shards.readers.fields import encodable, usable_caption
from ..shards.storage import store
from ..shards.storage.tars import DATED_MEMBER, IMAGE_MEMBERS, content, headers, images_of, missing_date, open_tar
from .shares import ShardDataError, Share

EXPECTED = (
    f"KEY.txt with captions, one a line, and one of {', '.join('KEY.' + name for name in IMAGE_MEMBERS)} "
    "(KEY.0.jpg, KEY.1.jpg, ... of a place at several dates)"
)
PATIENCE = 200
"""So many samples without a usable one prove that there is none."""

LOOK_AT_SHARDS = 4

Sample = dict[str, Any]


@dataclass
class Tally:
    """What became of the samples of one epoch, in one worker or all of them."""

    complete: int = 0
    """Samples with an image and captions."""
    usable: int = 0
    """Complete samples whose image could be decoded."""
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """`URL: sample KEY` -> reason, of the first problems."""
    _LIMIT = 100

    @property
    def problems(self) -> int:
        """Number of problems; beyond the examples, one that comes by twice in an epoch counts twice."""
        return self.reasons.total()

    def reject(self, sample: Sample, reason: str, detail: str = "", *, passed: int) -> None:
        """Count a sample that cannot be used; `passed` others have passed the same check.

        Raises:
            ShardDataError: none has passed, of PATIENCE samples.
        """
        self.note(f"{sample['__url__']}: sample {sample['__key__']}", reason, detail)
        if not passed and self.problems >= PATIENCE:
            raise self.nothing_usable(f"the first {self.problems} samples")

    def note(self, what: str, reason: str, detail: str = "") -> None:
        """Count a problem."""
        what, detail = printable(what), printable(detail)  # the trainer's log may go to a terminal
        if what in self.examples:
            return
        self.reasons[reason] += 1
        if len(self.examples) < self._LIMIT:
            self.examples[what] = f"{reason}{detail and f' ({detail})'}"

    def nothing_usable(self, where: str) -> ShardDataError:
        """The error that says what was found and what is expected."""
        found = "; ".join(f"{count} x {reason}" for reason, count in self.reasons.most_common(5))
        first = f", first {next(iter(self.examples))}" if self.examples else ""
        return ShardDataError(
            f"{where}: no sample can be used. Found: {found or 'no sample at all'}{first}. Expected: {EXPECTED}. "
            "`msa-openclip shards build` makes such shards, also from tars with other names and image formats."
        )

    def add(self, other: Tally) -> None:
        """Take in the tally of another worker."""
        self.complete += other.complete
        self.usable += other.usable
        self.reasons.update(other.reasons)
        self.examples = dict([*self.examples.items(), *other.examples.items()][: self._LIMIT])

    def __str__(self) -> str:
        """The problems, a line each."""
        lines = [f"{what}: {reason}" for what, reason in self.examples.items()]
        more = self.problems - len(lines)
        return "\n  ".join(lines + ([f"and {more:,} more"] if more > 0 else []))


def read_share(
    share: Share,
    tally: Tally,
    *,
    fill_cache: bool = True,
    members: Sequence[str] = IMAGE_MEMBERS,
    metadata: bool = False,
    dates: int = 1,
) -> Iterator[Sample]:
    """Samples of a share that have an image and captions, still encoded: `__key__`, `__url__`, `image`, `captions`.

    `members` are the extensions that `image` may have; of several `dates` it is a list.  With `metadata` KEY.json comes
    too.

    Raises:
        StreamError: the shard cannot be opened, or is damaged.
        ShardDataError: the first PATIENCE samples are all unusable.
    """
    wanted = (*members, "txt", *(["json"] if metadata else []))
    try:
        with open_shard(share.url, fill_cache=fill_cache) as file:
            for group in group_by_keys_nothrow(_members(file, share, tally, wanted)):
                sample = _usable(group, tally, members, dates)
                if sample is not None:
                    yield sample
    except tarfile.TarError as error:
        why = " ".join(str(error).split())
        raise StreamError(
            f"{share.url}: damaged, or not a tar ({why}). `msa-openclip shards verify` finds the place; "
            "copy or build the shard again."
        ) from error


def look_at_first_sample(urls: Sequence[str], members: Sequence[str] = IMAGE_MEMBERS, dates: int = 1) -> Sample:
    """Find the first sample with image and captions: wrong data is refused within seconds, before all else is built.

    Raises:
        StreamError: a local shard does not exist.
        ShardDataError: there is none in the first LOOK_AT_SHARDS shards.
    """
    for url in urls:
        if store.is_local(url) and not url.startswith("pipe:") and not store.exists(url):
            raise StreamError(f"{url}: no such file. Check the name and the braces.")
    tally = Tally()
    for url in urls[:LOOK_AT_SHARDS]:
        sample = next(read_share(Share(url), tally, fill_cache=False, members=members, dates=dates), None)
        if sample is not None:
            return sample
    raise tally.nothing_usable(", ".join(urls[:LOOK_AT_SHARDS]))


_META = re.compile(r"__[^/]*__($|/)")  # members that webdataset passes over


def _members(file: IO[bytes], share: Share, tally: Tally, extensions: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The members of the share as webdataset has them: `fname`, `data` (None if it is of no use here), `__url__`."""
    mode = "r:*" if hasattr(file, "seek") else "r|*"
    index, last_key = -1, None
    with open_tar(file, mode, bufsize=1 << 16) as tar:
        for info in headers(tar):
            key, extension = base_plus_ext(info.name)
            if key is None or not info.isreg() or _META.match(info.name):
                continue
            if key != last_key:
                index, last_key = index + 1, key
            if index < share.start:
                continue
            if share.stop is not None and index >= share.stop and share.stop != share.size:
                return
            wanted = extension.lower() in extensions or DATED_MEMBER.fullmatch(extension.lower())
            yield {"fname": info.name, "data": content(tar, info) if wanted else None, "__url__": share.url}
    if share.size not in (None, index + 1):
        tally.note(share.url, "sizes.json is wrong", f"it says {share.size} samples, the shard has {index + 1}")


def _usable(members: Sample, tally: Tally, images: Sequence[str], dates: int) -> Sample | None:
    """Image and captions of a sample; None, and a line in the tally, if it lacks one, or has other dates."""
    found = [members[name] for name in images if name in members][:1] or images_of(members)
    gap = missing_date(members)
    if not found or "txt" not in members or gap is not None:
        names = ", ".join(sorted(name for name in members if not name.startswith("__")))
        lack = f"image of date {gap}" if gap is not None else "captions" if found else "image"
        tally.reject(members, f"no {lack} among the members {names}", passed=tally.complete)
        return None
    if len(found) != dates:
        tally.reject(members, f"{len(found)} dates, and the model takes {dates} (msa_cfg.dates)", passed=tally.complete)
        return None
    if not encodable(members["__key__"]):
        tally.reject(members, "its name is not UTF-8", passed=tally.complete)
        return None
    try:
        lines = members["txt"].decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        tally.reject(members, "captions are not UTF-8", str(error), passed=tally.complete)
        return None
    captions = [caption for caption in map(usable_caption, lines) if caption]
    if not captions:
        tally.reject(members, "captions are blank", passed=tally.complete)
        return None
    tally.complete += 1
    image = found if dates > 1 else found[0]
    sample = {"__key__": members["__key__"], "__url__": members["__url__"], "image": image, "captions": captions}
    return sample | {"metadata": members["json"]} if "json" in members else sample


def decode(data: bytes, max_pixels: int | None = None) -> Image.Image:
    """RGB pixels of an image file, as webdataset's `pilrgb`.

    Raises:
        Exception: whatever Pillow raises for a file that it cannot read, OSError and others; ValueError for an image
            of more than `max_pixels`, before its pixels are decoded.
    """
    with open_image(data) as image:
        if max_pixels is not None and image.width * image.height > max_pixels:
            raise ValueError(f"{image.width} x {image.height} pixels, --max-image-pixels is {max_pixels}")
        return image.convert("RGB")


def class_of(sample: Sample) -> int:
    """`class_number` of the scene class of a sample that was read with its metadata.

    Raises:
        ShardDataError: it has none.
    """
    where = f"{sample['__url__']}: sample {sample['__key__']}"
    content = sample.get("metadata")
    try:
        name = parse_json(content, where).get("class") if content else None
    except (FileProblem, AttributeError) as error:
        raise ShardDataError(f"{where}: its JSON is not readable ({error}); build the shard again.") from error
    if not isinstance(name, str):
        raise ShardDataError(
            f'{where}: has no class, and msa_cfg.loss.same_class_weight compares classes. Name the "class" of each '
            "image in the captions and build the shards (and features) again, or set the key to 1."
        )
    return class_number(name)


def draw_caption(captions: list[str], key: str, seed: int, epoch: int) -> str:
    """One caption of the sample `key` for an epoch: in n epochs each of its n captions once, in random order.

    It depends on nothing else, so the number of workers and ranks, and resuming, change nothing.
    """
    lap, step = divmod(epoch, len(captions))
    return random.Random(f"{seed}/{lap}/{key}").sample(captions, len(captions))[step]
