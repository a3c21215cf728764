"""Images with their captions and metadata, as evaluation, indexes and explanations read them.

Only locations are kept, never pixels: a set of any size is a list of (file, offset, size), and each worker or rank
reads the bytes of its own share.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..shards.records import Location


class EvalDataError(ValueError):
    """The data to evaluate on cannot be used; the message names file, sample and remedy."""


@dataclass(frozen=True)
class CaptionedImage:
    """One image with its captions, class and metadata."""

    image_id: str
    location: Location
    captions: tuple[str, ...]
    """May be empty: the image then only distracts."""
    label: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """What else shards know of it: `geo` (crs, bounds, gsd_m), `meta`; of a place at several dates `dates` (a list,
    null for unknown ones) and `later`, rows of the locations behind the first.  Indexes keep it as it is."""
    content: str = field(default="", compare=False)
    """What tells this image from others of its name, and from a later version of itself; empty if not computed."""

    @property
    def locations(self) -> tuple[Location, ...]:
        """Where the images of all dates lie, in their order; one as a rule.

        Raises:
            EvalDataError: `later` of the metadata, out of a damaged index, is no list of locations.
        """
        try:
            return (self.location, *map(Location.from_row, self.metadata.get("later", ())))
        except (TypeError, AttributeError) as error:
            raise EvalDataError(f"{self.location.url}: image {self.image_id}: its later dates are damaged.") from error


def later_dates(places: Iterable[Location]) -> dict[str, Any]:
    """The entry of an image's metadata for its dates behind the first; nothing if there are none."""
    rows = [place.to_row() for place in places]
    return {"later": rows} if rows else {}
