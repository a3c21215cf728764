"""Images with their captions and metadata, as evaluation, indexes and explanations read them.

Only locations are kept, never pixels: a set of any size is a list of (file, offset, size), and each worker or rank
reads the bytes of its own share.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    """What else shards know of it: `geo` (crs, bounds, gsd_m), `meta`, `dates` (a list, null where unknown)."""
    content: str = field(default="", compare=False)
    """What tells this image from others of its name, and from a later version of itself; empty if not computed."""
    later: tuple[Location, ...] = ()
    """Where the same place at later dates lies, in their order."""

    @property
    def locations(self) -> tuple[Location, ...]:
        """Of all dates; one as a rule."""
        return (self.location, *self.later)
