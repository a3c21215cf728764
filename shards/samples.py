"""One planned sample -> the members of a shard: KEY.jpg, KEY.txt, KEY.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from .images import Ready
from .plan import Sample
from .records import sample_key


def members(sample: Sample, image: Ready, geo: Mapping[str, Any]) -> list[tuple[str, bytes]]:
    """Names and bytes of a sample, in the order in which webdataset groups them.

    Layout `image`: the text is all captions, a line each.  Layout `pair`: the text is one caption and the key ends in
    `+INDEX`.  In both the JSON carries `image_id`, by which the captions of an image can be put together again.
    """
    record = sample.record
    key = sample_key(record.image_id)
    captions = record.captions
    about: dict[str, Any] = {"image_id": record.image_id, "source": record.source, "split": record.split}
    if sample.caption is not None:
        key = f"{key}+{sample.caption}"
        about |= {"caption_index": sample.caption, "caption_count": len(captions)}
        captions = (captions[sample.caption],)
    if record.label is not None:
        about["class"] = record.label
    about |= {"captions": captions} | {f"caption_{index}": caption for index, caption in enumerate(captions)}
    about |= {"width": image.width, "height": image.height, "sha256": hashlib.sha256(image.data).hexdigest()}
    about |= record.meta
    if geo:
        about["geo"] = geo
    text = json.dumps(about, ensure_ascii=False, separators=(",", ":"))
    return [
        (f"{key}.{image.suffix}", image.data),
        (f"{key}.txt", "\n".join(captions).encode()),
        (f"{key}.json", text.encode()),
    ]
