"""Scenes of STAC catalogues, collections, items and item collections (extra `stac`), local or by any fsspec URL.

    tiles, skipped = read_stac("https://example.org/catalog.json", tiling=Tiling(tile_px=512))

Item id, collection and date go into the metadata of every tile.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

from ..shards.storage import store
from .captioned import CaptionedImage, EvalDataError
from .scenes import SCENE_EXTENSIONS, Skipped, Tiling, read_scenes
from .streams import retrying

_PREFERRED_ROLES = ("visual", "data")


def read_stac(
    href: str, *, asset: str | None = None, tiling: Tiling | None = None
) -> tuple[list[CaptionedImage], list[Skipped]]:
    """Tiles of every item below a catalogue, and what was left out.

    Args:
        href: catalogue, collection, item or item collection.
        asset: key of the asset to read; by default the first GeoTIFF with the role `visual`, else `data`, else any.
        tiling: how scenes are cut.
    Raises:
        EvalDataError: the catalogue cannot be read, or no tile is left.
    """
    tiles: list[CaptionedImage] = []
    skipped: list[Skipped] = []
    for item in _items(href, skipped):
        name = item.get_self_href() or item.id
        scene = _scene(item, asset)
        if scene is None:
            wanted = f"asset {asset!r}" if asset else "GeoTIFF asset"
            skipped.append(Skipped(name, f"no {wanted}; it has {', '.join(item.assets) or 'no assets'}"))
            continue
        try:
            found, left_out = read_scenes([scene], tiling, _metadata(item))
        except EvalDataError as error:
            skipped.append(Skipped(name, str(error)))
            continue
        tiles += found
        skipped += left_out
    if not tiles:
        why = f"first {skipped[0].file}: {skipped[0].reason}" if skipped else "it has no items"
        raise EvalDataError(f"{href}: no tile can be used; {why}.")
    return tiles, skipped


def _items(href: str, skipped: list[Skipped]) -> Iterator[Any]:
    """All items below a catalogue, each object read once; those that cannot be read are skipped by name."""
    try:
        import pystac
    except ImportError as error:
        raise EvalDataError("STAC needs pystac: pip install 'msa_openclip[stac]'.") from error
    waiting, seen = [href], {href}
    while waiting:
        address = waiting.pop(0)
        try:
            content = json.loads(retrying(address, functools.partial(store.read_bytes, address)))
            if content.get("type") == "FeatureCollection":
                yield from pystac.ItemCollection.from_dict(content)
                continue
            found = pystac.StacIO.default().stac_object_from_dict(content, href=address)
        except Exception as error:  # pystac raises nearly everything for one broken file or another
            if address == href:
                raise EvalDataError(f"{href}: not a STAC object that can be read: {error}") from error
            skipped.append(Skipped(address, f"not a STAC object that can be read: {error}"))
            continue
        found.set_self_href(address)  # relative links and assets start here, whatever its own link says
        if isinstance(found, pystac.Item):
            yield found
            continue
        links = (link.get_absolute_href() for link in found.links if link.rel in ("item", "child"))
        new = dict.fromkeys(link for link in links if link and link not in seen)
        seen |= new.keys()
        waiting += new


def _scene(item: Any, key: str | None) -> str | None:
    """Address of the raster of an item."""
    if key is not None:
        return item.assets[key].get_absolute_href() if key in item.assets else None
    rasters = [
        asset
        for asset in item.assets.values()
        if "tiff" in (asset.media_type or "") or asset.href.lower().endswith(SCENE_EXTENSIONS)
    ]
    for role in _PREFERRED_ROLES:
        for asset in rasters:
            if role in (asset.roles or ()):
                return str(asset.get_absolute_href())
    return str(rasters[0].get_absolute_href()) if rasters else None


def _metadata(item: Any) -> dict[str, Any]:
    when = item.datetime or item.common_metadata.start_datetime
    stac = {"item": item.id} | ({"collection": item.collection_id} if item.collection_id else {})
    return {"stac": stac, **({"meta": {"date": when.date().isoformat()}} if when else {})}
