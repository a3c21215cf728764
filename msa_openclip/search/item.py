"""item.json of an index: the whole of it as a STAC item, with the keys of the STAC embedding proposal.

It says nothing that the segments do not: where all tiles lie, from when to when, which model made the vectors, and the
files.  Times that nobody knows are open: the years 1 and 9999.
"""

from __future__ import annotations

import json
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from ..shards.storage import store
from . import places
from .files import TILES, Manifest, checked_files, open_parquet, or_damaged, read_columns
from .schema import extent, product_of

ITEM = "item.json"
_PARQUET = "application/vnd.apache.parquet"
_ARRAY = "application/x-npy"


def write_item(root: Path, manifest: Manifest) -> None:
    """Write item.json of an index whose segments are whole."""
    store.write_bytes(str(root / ITEM), item_text(root, manifest).encode())


def item_text(root: Path, manifest: Manifest) -> str:
    """What item.json holds; the same for the same index.

    Raises:
        ImageIndexError: a segment is damaged.
    """
    boxes: list[places.Box] = []
    times: list[datetime] = []
    product = manifest.product(None, None)
    assets: dict[str, Any] = {}
    for segment in manifest.segments:
        folder, files = root / segment.name, checked_files(root, segment)
        parquet = open_parquet(folder, files[TILES])
        table = read_columns(folder, parquet, ["bbox", "datetime"])
        if segment.images:
            product = or_damaged(folder, partial(product_of, parquet.schema_arrow, TILES))
        span = or_damaged(folder, pc.min_max(table["datetime"]).as_py)
        times += [time for time in span.values() if time]
        boxes.append(extent(table) or places.NOWHERE)
        for name in files:
            kind, role = (_PARQUET, "metadata") if name.endswith(".parquet") else (_ARRAY, "data")
            assets[f"{segment.name}/{name}"] = {"href": f"./{segment.name}/{name}", "type": kind, "roles": [role]}
    item: dict[str, Any] = {
        "type": "Feature",
        "stac_version": "1.1.0",
        "id": f"index-{manifest.fingerprint[:16]}",
        "geometry": None,
        "properties": {
            "datetime": None,
            "start_datetime": _text(min(times, default=datetime.min)),
            "end_datetime": _text(max(times, default=datetime.max)),
            "images": sum(segment.images for segment in manifest.segments),
            **product.embedding(),
        },
        "links": [],
        "assets": assets,
    }
    box = places.extent(np.array(boxes).reshape(-1, 4))
    if box:
        west, south, east, north = box
        ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
        item |= {"bbox": box, "geometry": {"type": "Polygon", "coordinates": [ring]}}
    return json.dumps(item, indent=2) + "\n"


def _text(time: datetime) -> str:
    return time.replace(tzinfo=timezone.utc, microsecond=0).isoformat().replace("+00:00", "Z")
