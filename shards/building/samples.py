"""One planned sample -> the members of a shard: KEY.jpg (KEY.0.jpg, KEY.1.jpg, ... of dates), KEY.txt, KEY.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..imagery.prepare import EncodedImage
from ..records import sample_key
from .plan import Sample


def members(sample: Sample, images: Sequence[EncodedImage], geo: Mapping[str, Any]) -> list[tuple[str, bytes]]:
    """Names and bytes of a sample with its images in order of date, in the order in which webdataset groups them.

    Layout `image`: the text is all captions, a line each.  Layout `pair`: the text is one caption and the key ends in
    `+INDEX`.  In both the JSON carries `image_id`, by which the captions of an image can be put together again.
    """
    record = sample.record
    key = sample_key(record.image_id)
    captions = record.captions
    metadata: dict[str, Any] = {"image_id": record.image_id, "source": record.source, "split": record.split}
    if sample.caption is not None:
        key = f"{key}+{sample.caption}"
        metadata |= {"caption_index": sample.caption, "caption_count": len(captions)}
        captions = (captions[sample.caption],)
    if record.label is not None:
        metadata["class"] = record.label
    metadata |= {"captions": captions} | {f"caption_{index}": caption for index, caption in enumerate(captions)}
    content = b"".join(image.data for image in images)
    metadata |= {"width": images[0].width, "height": images[0].height, "sha256": hashlib.sha256(content).hexdigest()}
    metadata |= record.meta
    if len(images) > 1:
        metadata.setdefault("dates", [None] * len(images))
    if geo:
        metadata["geo"] = geo
    text = json.dumps(metadata, ensure_ascii=False, separators=(",", ":"))
    numbers = [f".{date}" for date in range(len(images))] if len(images) > 1 else [""]
    return [
        *((f"{key}{number}.{image.suffix}", image.data) for number, image in zip(numbers, images, strict=True)),
        (f"{key}.txt", "\n".join(captions).encode()),
        (f"{key}.json", text.encode()),
    ]
