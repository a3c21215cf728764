"""What flows through the builder: an entry as a reader finds it, a record ready to be planned, a rejection."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

KEY_LIMIT = 80  # bytes; with the pair suffix and the extension a member name stays below ustar's 100
SPLITS = ("train", "val", "test")


class ShardError(ValueError):
    """The caller gave a source, an option or a folder that cannot be used; the message names the remedy."""


class ImageProblem(ShardError):
    """One image cannot become a sample; the build goes on and writes the reason to `rejected.jsonl`."""


@dataclass(frozen=True, slots=True)
class Location:
    """Where the bytes of an image lie: a whole file, `size` bytes at `offset` of a tar, or a cell of a saved table.

    `window` is (column, row, width, height) in pixels, for a tile of a larger scene.
    """

    url: str
    offset: int | None = None
    size: int | None = None
    row: int | None = None
    column: str | None = None
    window: tuple[int, int, int, int] | None = None

    def to_row(self) -> dict[str, Any]:
        """As plain data."""
        return {name: getattr(self, name) for name in self.__slots__}

    @staticmethod
    def from_row(row: Mapping[str, Any]) -> Location:
        """The inverse of `to_row`."""
        return Location(**{**row, "window": tuple(row["window"]) if row.get("window") else None})


@dataclass(frozen=True, slots=True)
class Entry:
    """One image as a reader found it: nothing is cleaned, looked up or checked yet.

    A name in `image` is looked up in the image folder; a `Location` is used as it is.  `later` are images of the same
    place at later dates, in their order.  `meta` joins the sample's JSON.
    """

    image: str | Location
    captions: tuple[str, ...]
    split: str | None = None
    label: str | None = None
    image_id: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    source: str | None = None
    later: tuple[str | Location, ...] = ()

    @property
    def images(self) -> tuple[str | Location, ...]:
        """The images in order of date; one as a rule."""
        return (self.image, *self.later)


@dataclass(frozen=True, slots=True)
class Record:
    """One image of the plan: found, named, with its non-blank captions."""

    image_id: str
    image: Location
    source: str
    captions: tuple[str, ...]
    split: str
    label: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    later: tuple[Location, ...] = ()
    """Images of the same place at later dates, in their order."""

    @property
    def images(self) -> tuple[Location, ...]:
        """The images in order of date; one as a rule."""
        return (self.image, *self.later)

    def to_line(self) -> bytes:
        """One JSON line, the form in which the plan keeps records on disk."""
        row = {name: getattr(self, name) for name in self.__slots__ if name != "later"}
        row["image"] = self.image.to_row()
        if self.later:  # records of one date keep the lines, and their builds the mark, that they always had
            row["later"] = [place.to_row() for place in self.later]
        return json.dumps(row, separators=(",", ":")).encode() + b"\n"

    @staticmethod
    def from_line(line: bytes) -> Record:
        """The inverse of `to_line`."""
        row = json.loads(line)
        image, *later = map(Location.from_row, (row.pop("image"), *row.pop("later", ())))
        return Record(image=image, captions=tuple(row.pop("captions")), later=tuple(later), **row)


@dataclass(frozen=True, slots=True)
class Rejection:
    """A row of `rejected.jsonl`: the file, the kind of problem (counted in the summary), and what exactly."""

    file: str
    reason: str
    detail: str = ""


def clean_caption(text: str) -> str:
    """Collapse all white space, so that a caption never holds the newline that separates captions."""
    return " ".join(text.split())


def folded_caption(caption: str) -> str:
    """What two captions that differ in white space and case alone have in common."""
    return clean_caption(caption).casefold()


def class_words(name: str) -> str:
    """`BaseballField`, `baseball_field` and `baseball-field` in words: baseball field."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return re.sub(r"[\s_\-]+", " ", spaced).strip().lower()


def sample_key(image_id: str) -> str:
    """A WebDataset key for an image id: ASCII, free of dots (they would start the extension), never empty.

    One to one but for slashes: `/a//b` has the key of `a/b`, and `intake.to_records` rejects the second of the two.
    `+` never comes out of the quoting and so is free to number the captions of the `pair` layout.
    """
    parts = [quote(part, safe="").replace(".", "%2E") for part in image_id.split("/") if part]
    key = "/".join(parts) or quote("/", safe="")
    if len(key) <= KEY_LIMIT:
        return key
    from hashlib import sha256

    return key[: KEY_LIMIT - 17].rstrip("/%") + "-" + sha256(image_id.encode()).hexdigest()[:16]
