"""Which images of an index a query may find: by class, bounding box and date."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


class SearchError(ValueError):
    """A query cannot be answered; the message says why."""


@dataclass(frozen=True, kw_only=True)
class SearchFilter:
    """Which images may be found; what is not given does not matter, and an image that lacks a given field is out."""

    classes: frozenset[str] = frozenset()
    box: tuple[float, float, float, float] | None = None
    """West, south, east, north in the images' own coordinates; overlapping images are in."""
    since: str | None = None
    """ISO date, inclusive, against `meta.date`."""
    until: str | None = None
    """ISO date, inclusive: `2020` includes all of that year."""

    def __post_init__(self) -> None:
        if self.box and not (self.box[0] <= self.box[2] and self.box[1] <= self.box[3]):
            raise SearchError(f"box {self.box}: expected west <= east and south <= north.")

    def __call__(self, filter_fields: NDArray[np.void]) -> NDArray[np.bool_]:
        """Which images may be found, (n,) of `ImageIndex.facts`."""
        allowed = np.ones(len(filter_fields), dtype=np.bool_)
        if self.classes:
            allowed &= np.isin(filter_fields["label"], list(self.classes))
        if self.box:
            west, south, east, north = filter_fields["bounds"].T  # NaN, where nothing is known, compares as false
            allowed &= (west <= self.box[2]) & (east >= self.box[0]) & (south <= self.box[3]) & (north >= self.box[1])
        if self.since or self.until:
            allowed &= filter_fields["date"] != ""
        if self.since:
            allowed &= filter_fields["date"] >= self.since
        if self.until:
            allowed &= filter_fields["date"].astype(f"U{len(self.until)}") <= self.until
        return allowed
