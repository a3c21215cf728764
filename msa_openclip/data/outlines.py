"""Outlines that anybody may have written, as shapely's geometries.

GEOS reads collections by recursion and without a bound: some hundred kilobytes of nested ones end the process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_MOST_NESTED_BYTES = 20_000
"""Of an outline of several parts in WKB; a level takes at least 9."""
_MOST_COLLECTIONS = 1000
"""In an outline in WKT."""
_SINGLE = (1, 2, 3)
"""Types of WKB that hold no others: point, line, polygon."""


class OutlineError(ValueError):
    """An outline cannot be read; the message says why."""


def from_wkb(wkb: Sequence[bytes | None]) -> Any:
    """Geometries (n,), None where there is none.

    Raises:
        OutlineError: one is no WKB, or of several parts and larger than any that is read.
    """
    import shapely

    for one in wkb:
        if one is not None and len(one) > _MOST_NESTED_BYTES and _type(one) not in _SINGLE:
            raise OutlineError(
                f"an outline of several parts takes {len(one):,} bytes of WKB, more than the {_MOST_NESTED_BYTES:,} "
                "that are read; simplify it"
            )
    try:
        return shapely.from_wkb(np.array(wkb, dtype=object))
    except (shapely.errors.ShapelyError, TypeError) as error:
        raise OutlineError(f"an outline is no WKB ({error})") from error


def from_wkt(text: str) -> Any:
    """A geometry.

    Raises:
        OutlineError: it is no WKT, or of more collections than are read.
    """
    import shapely

    if text.upper().count("COLLECTION") > _MOST_COLLECTIONS:
        raise OutlineError(f"an outline of more than {_MOST_COLLECTIONS:,} collections; simplify it")
    try:
        return shapely.from_wkt(text)
    except (shapely.errors.ShapelyError, TypeError) as error:
        raise OutlineError(f"an outline is no WKT ({error})") from error


def _type(wkb: bytes) -> int:
    """The type of a geometry, without what says of more dimensions."""
    return int.from_bytes(wkb[1:5], "big" if wkb[0] == 0 else "little") % 0x10000 % 1000
