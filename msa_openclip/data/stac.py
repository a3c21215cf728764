"""Scenes of STAC catalogues, collections, items and item collections (extra `stac`), local or by any fsspec URL.

    tiles, skipped = read_stac("https://example.org/catalog.json", tiling=Tiling(tile_px=512))

Item id, collection and time go into the metadata of every tile.
"""

from __future__ import annotations

import functools
import json
import os
from collections import deque
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from typing import Any, NamedTuple
from urllib.parse import urljoin

from ..shards.records import ImageProblem
from ..shards.storage import store
from .captioned import CaptionedImage, EvalDataError
from .scenes import SCENE_EXTENSIONS, Skipped, Tiling, nothing_left, read_scene, reason_to_skip
from .streams import StreamError, is_absent, retrying

_PREFERRED_ROLES = ("visual", "data")
_MOST_PAGES = 10_000
"""Of items, in one call: a server that always names a next page must not be followed for ever."""


class _Found(NamedTuple):
    """An item before it is read."""

    name: str
    """What it is called when it is left out."""
    address: str
    """From where its relative addresses go."""
    content: Any


def read_stac(
    href: str, *, asset: str | None = None, tiling: Tiling | None = None
) -> tuple[list[CaptionedImage], list[Skipped]]:
    """Tiles of every item below a catalogue, and what was left out.

    Args:
        href: catalogue, collection, item or item collection; of an API also a collection or the first page of its
            items.
        asset: key of the asset to read; by default the first GeoTIFF with the role `visual`, else `data`, else any.
        tiling: how scenes are cut.
    Raises:
        EvalDataError: the catalogue cannot be read, has pages that cannot be followed, or no tile is left.
        StreamError: a store cannot be reached.
    """
    tiles: list[CaptionedImage] = []
    skipped: list[Skipped] = []
    for found in _items(href, skipped):
        try:
            of_item, left_out = _tiles(found, asset, tiling or Tiling())
        except _Unusable as error:
            skipped.append(Skipped(found.name, str(error)))
            continue
        tiles += of_item
        skipped += left_out
    if not tiles:
        raise nothing_left(href, skipped, "it has no items")
    return tiles, skipped


class _Unusable(ValueError):
    """An item gives no scene; the message says why."""


def _tiles(found: _Found, key: str | None, tiling: Tiling) -> tuple[list[CaptionedImage], list[Skipped]]:
    import pystac

    try:
        item = pystac.Item.from_dict(found.content)
        if item.id is None:
            raise ValueError("it has no id")
        scene, known = _scene(item, key), _metadata(item)
    except Exception as error:  # pystac raises nearly everything for one broken item or another
        raise _Unusable(f"not a STAC item that can be read: {type(error).__name__}: {error}") from error
    if scene is None:
        wanted = f"asset {key!r}" if key else "GeoTIFF asset"
        raise _Unusable(f"no {wanted}; it has {', '.join(item.assets) or 'no assets'}")
    try:
        return read_scene(_resolve(scene, found.address), tiling, known)
    except (ImageProblem, StreamError) as problem:
        raise _Unusable(reason_to_skip(problem)) from problem


def _items(href: str, skipped: list[Skipped]) -> Iterator[_Found]:
    """All items below a catalogue, each object read once; objects that cannot be read are skipped by name."""
    try:
        import pystac  # noqa: F401 - for its absence
    except ImportError as error:
        raise EvalDataError("STAC needs pystac: pip install 'msa_openclip[stac]'.") from error
    waiting, seen, pages = deque([href]), {href}, 0
    while waiting:
        address = waiting.popleft()
        try:
            content = json.loads(retrying(address, functools.partial(store.read_bytes, address)))
            items = _items_in(content, address)
            links = _links(content, address)
        except Exception as error:  # pystac raises nearly everything for one broken file or another
            if address == href:
                raise EvalDataError(f"{href}: not a STAC object that can be read: {error}") from error
            if isinstance(error, StreamError) and not is_absent(error):
                raise
            skipped.append(Skipped(address, f"not a STAC object that can be read: {error}"))
            continue
        yield from items
        pages += content.get("type") == "FeatureCollection"
        if pages > _MOST_PAGES:
            raise EvalDataError(f"{href}: more than {_MOST_PAGES:,} pages of items; ask for larger ones (limit=1000).")
        new = dict.fromkeys(_get_only(links, address))
        waiting += [link for link in new if link not in seen]
        seen |= new.keys()


def _items_in(content: Any, address: str) -> list[_Found]:
    """The items that an object is or holds; none if it is a catalogue.

    Raises:
        Exception: of nearly any type; it is no STAC object.
    """
    import pystac

    if content.get("type") == "FeatureCollection":
        features = content["features"]
        return [_feature(one, address, f"item {place} of {len(features)}") for place, one in enumerate(features, 1)]
    if content.get("type") == "Feature":
        return [_Found(address, address, content)]
    if isinstance(pystac.StacIO.default().stac_object_from_dict(content, href=address), pystac.Item):
        return [_Found(address, address, content)]  # of a version of STAC before items were features
    return []


def _feature(content: Any, address: str, place: str) -> _Found:
    """An item of an item collection; relative addresses go from its own, or where it has none from the collection's."""
    if not isinstance(content, Mapping):
        return _Found(f"{address}: {place}", address, content)
    own = [link["href"] for link in _list_of_links(content) if link["rel"] == "self" and "://" in link["href"]]
    name = place if content.get("id") is None else content["id"]
    return _Found(f"{address}: {name}", own[0] if own else address, content)


def _list_of_links(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The links that have what a link must have."""
    links = content.get("links")
    return [
        link
        for link in (links if isinstance(links, list) else ())
        if isinstance(link, Mapping) and isinstance(link.get("href"), str) and isinstance(link.get("rel"), str)
    ]


def _links(content: Any, address: str) -> list[Mapping[str, Any]]:
    """The links from an object to what holds further items."""
    if content.get("type") == "Feature":
        return []
    links = _list_of_links(content)
    if content.get("type") == "FeatureCollection":
        return [link for link in links if link["rel"] == "next"]
    below = [link for link in links if link["rel"] in ("item", "child")]
    # An API names the items of a collection by one link to their first page; where each has its own, that does.
    return below or [link for link in links if link["rel"] == "items"]


def _get_only(links: list[Mapping[str, Any]], address: str) -> Iterator[str]:
    """Where links lead.

    Raises:
        EvalDataError: one is to be asked with a body, and what it leads to would be missing.
    """
    for link in links:
        if str(link.get("method", "GET")).upper() != "GET":
            raise EvalDataError(
                f"{address}: its link `{link['rel']}` is to be asked by {link['method']}, and only GET is followed. "
                "Give the address of items that are asked by GET, such as .../collections/NAME/items."
            )
        yield _resolve(link["href"], address)


def _resolve(href: str, base: str) -> str:
    """The address of what the object at `base` calls `href`."""
    if "://" in href or href.startswith("/vsi"):
        return href
    if store.is_local(base):
        path = store.local_path(base)
        return base.removesuffix(path) + os.path.abspath(os.path.join(os.path.dirname(path), href))
    protocol, _, rest = base.partition("://")
    return protocol + urljoin(f"http://{rest}", href).removeprefix("http")  # urljoin knows few protocols


def _scene(item: Any, key: str | None) -> str | None:
    """What an item calls its raster."""
    if key is not None:
        return str(item.assets[key].href) if key in item.assets else None
    rasters = [
        asset
        for asset in item.assets.values()
        if "tiff" in (asset.media_type or "") or asset.href.partition("?")[0].lower().endswith(SCENE_EXTENSIONS)
    ]
    for role in _PREFERRED_ROLES:
        for asset in rasters:
            if role in (asset.roles or ()):
                return str(asset.href)
    return str(rasters[0].href) if rasters else None


def _metadata(item: Any) -> dict[str, Any]:
    when = item.datetime or item.common_metadata.start_datetime
    stac = {"item": item.id} | ({"collection": item.collection_id} if item.collection_id else {})
    known = when is not None and when.year > 1  # the year 1 stands for any time, as `search --format stac` writes it
    return {"stac": stac, **({"meta": {"date": _in_utc(when).isoformat()}} if known else {})}


def _in_utc(when: datetime) -> datetime:
    """A time in UTC, which it is in where it names no zone."""
    return when.astimezone(timezone.utc) if when.tzinfo else when.replace(tzinfo=timezone.utc)
