"""Outlines of anybody: read, or refused before GEOS, which reads nested ones by recursion, ends the process."""

from __future__ import annotations

import pytest

from msa_openclip.data.outlines import OutlineError, from_wkb, from_wkt

shapely = pytest.importorskip("shapely", reason="shapely (extra archive) is not installed")


@pytest.mark.parametrize("kind", [b"\x01\x07\x00\x00\x00", b"\x00\x00\x00\x00\x06", b"\x01\xef\x03\x00\x80"])
def test_nested_outlines_are_refused(kind: bytes) -> None:
    """As a collection, as several polygons in the other order of bytes, and with heights."""
    one = (1).to_bytes(4, "big" if kind[0] == 0 else "little")
    with pytest.raises(OutlineError, match="900,000 bytes of WKB"):
        from_wkb([None, (kind + one) * 100_000])


def test_outlines_of_many_corners_are_read() -> None:
    circle = shapely.Point(1, 1).buffer(1, quad_segs=5000)
    islands = shapely.union_all([shapely.box(2 * n, 0, 2 * n + 1, 1) for n in range(90)])
    for drawn in (circle, islands):
        found = from_wkb([None, shapely.to_wkb(drawn)])
        assert found[0] is None
        assert found[1].equals(drawn)
    assert from_wkt("POINT (1 2)").equals(shapely.Point(1, 2))


def test_texts_that_are_no_outlines_are_refused() -> None:
    for text in ("GEOMETRYCOLLECTION (" * 100_000, "POLYGON", "\0", "POINT (x y)"):
        with pytest.raises(OutlineError):
            from_wkt(text)
    assert from_wkt("POINT EMPTY").is_empty
