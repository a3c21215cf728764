"""Images of an index one by one: what is decoded for them, and how little of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from helpers.index_files import append_part, tiles_of

from msa_openclip.data.captioned import CaptionedImage
from msa_openclip.search import schema, tiles
from msa_openclip.search.files import ImageIndexError
from msa_openclip.search.schema import to_table
from msa_openclip.shards.records import Location


def image(number: int) -> CaptionedImage:
    meta = {"meta": {"cloud": number, "date": "2020-02-29"}}
    return CaptionedImage(f"i{number}", Location("a.tif"), (f"a river {number}",), "river", meta, f"c{number}")


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tiles.Tiles:
    """Segments of 7 and 4 images in row groups of 3."""
    monkeypatch.setattr(schema, "ROW_GROUP", 3)
    return tiles_of(tmp_path, [[image(number) for number in numbers] for numbers in (range(7), range(7, 11))])


def test_images_of_several_row_groups(found: tiles.Tiles) -> None:
    assert list(found) == [image(number) for number in range(11)]
    assert [found[number] for number in (10, 0, 6, 7, 3, 2)] == [image(number) for number in (10, 0, 6, 7, 3, 2)]


def test_an_image_costs_the_decoding_of_its_row_group_once(found: tiles.Tiles, monkeypatch: pytest.MonkeyPatch) -> None:
    read, decoded = tiles.read_columns, []
    monkeypatch.setattr(tiles, "read_columns", lambda *asked: decoded.append(asked[3:]) or read(*asked))
    assert [found[number].image_id for number in (4, 5, 10, 4)] == ["i4", "i5", "i10", "i4"]
    assert decoded == [(3, 1), (1, 1)]


def test_another_number_of_rows_is_damage(tmp_path: Path) -> None:
    damaged = tiles.Tiles()
    append_part(damaged, tmp_path / "0.parquet", [image(number) for number in range(7)], count=8)
    with pytest.raises(ImageIndexError, match="7 rows in row groups, expected 8"):
        damaged[0]


def test_times_are_read_without_pandas(found: tiles.Tiles, tmp_path: Path) -> None:
    """Which takes a third of a second to import, at the first search of a process."""
    pytest.importorskip("pandas", reason="pandas is not installed")
    code = (
        "import sys, pyarrow.parquet as pq\n"
        "from msa_openclip.search.schema import to_images\n"
        f"(image,) = to_images(pq.ParquetFile({str(tmp_path / '0.parquet')!r}).read().slice(2, 1))\n"
        "assert 'pandas' not in sys.modules\n"
        "print(image.metadata)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == str(image(2).metadata)


@pytest.mark.parametrize("when", ["2020-02-29T12:00:00.25+02:00", "0001-01-01", "9999-12-31T23:59:59.999999Z", None])
def test_times_without_a_date_of_their_own(when: str | None) -> None:
    at = schema.instant(when) if when else None
    table = to_table([image(0)]).drop_columns(["date", "metadata", "datetime"])
    column = pa.array([at], schema.COLUMNS.field("datetime").type)
    table = table.append_column("datetime", column).append_column("metadata", pa.array([None], pa.string()))
    (found,) = schema.to_images(table)
    assert found.metadata["meta"].get("date") == (at.isoformat() if at else None)
