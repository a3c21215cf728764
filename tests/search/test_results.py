"""Answers as GeoJSON and as a STAC ItemCollection, from Python and as a command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.retrieval_data import square

from msa_openclip.data.captioned import CaptionedImage
from msa_openclip.search.results import geojson, item_collection
from msa_openclip.search.searcher import Hit
from msa_openclip.shards.records import Location

PLACED = CaptionedImage(
    "scenes/a.tif#1,2,3,4",
    Location("scenes/a.tif", window=(1, 2, 3, 4)),
    ("a river",),
    "river",
    {"geo": {"footprint": square(12, 50)}, "meta": {"date": "2020-06-30", "cloud": 3}},
)
ANSWERS = {
    "a river": [Hit(2.5, 0.5, (1.0, 2.0), PLACED), Hit(1.5, 0.25, (), CaptionedImage("b", Location("b.png"), ()))],
    "pictures": [Hit(0.5, 0.5, (), text="a caption")],
}


def test_geojson(tmp_path: Path) -> None:
    first, second = geojson(ANSWERS.items())["features"]
    assert first["geometry"] == square(12, 50)
    assert first["properties"] == {
        "query": "a river",
        "rank": 1,
        "score": 2.5,
        "cosine": 0.5,
        "match": [1.0, 2.0],
        "date": "2020-06-30",
        "cloud": 3,
        "class": "river",
        "captions": ["a river"],
        "source": "scenes/a.tif",
        "window": [1, 2, 3, 4],
    }
    assert (second["id"], second["geometry"], second["properties"]["rank"]) == ("b", None, 2)
    geopandas = pytest.importorskip("geopandas", reason="geopandas is not installed")
    frame = geopandas.GeoDataFrame.from_features(geojson(ANSWERS.items()))
    assert frame["score"].tolist() == [2.5, 1.5]


def test_what_a_list_says_of_an_image_hides_nothing_that_the_search_says() -> None:
    meta = {"query": "q", "rank": 7, "score": 0.9, "datetime": "x", "cloud": float("nan"), "bands": [1.0, float("inf")]}
    hits = [Hit(2.5, 0.5, (), CaptionedImage("b", Location("b.png"), (), metadata={"meta": meta}))]
    for found in (geojson([("a river", hits)]), item_collection([("a river", hits)])):
        properties = json.loads(json.dumps(found, allow_nan=False))["features"][0]["properties"]
        assert (properties["query"], properties["rank"], properties["score"]) == ("a river", 1, 2.5)
        assert (properties["cloud"], properties["bands"]) == (None, [1.0, None])
    assert properties["datetime"] is None


def test_item_collection() -> None:
    pystac = pytest.importorskip("pystac", reason="pystac (extra stac) is not installed")
    items = list(pystac.ItemCollection.from_dict(json.loads(json.dumps(item_collection(ANSWERS.items())))))
    for item in items:
        item.validate()
    assert [item.id for item in items] == ["scenes_a.tif#1,2,3,4", "b"]
    assert items[0].bbox == [12, 50, 13, 51]
    assert items[0].datetime.isoformat() == "2020-06-30T00:00:00+00:00"
    assert items[0].assets["image"].href == "scenes/a.tif"
    assert items[1].datetime is None
