"""`msa-openclip search`: texts or pictures against an index."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.captioned import CaptionedImage
from ..data.pixels import load_image
from ..evaluation.loading import load
from ..search.files import read_manifest
from ..search.filters import SearchError, SearchFilter
from ..search.index import ImageIndex
from ..search.nearest import KINDS, nearest
from ..search.searcher import CANDIDATES, Hit, Searcher
from ..shards.records import Location
from . import options as eval_options


def main(arguments: Sequence[str] | None = None) -> int:
    """Search and print."""
    parsed = _parser().parse_args(arguments)
    if bool(parsed.queries) == bool(parsed.like or parsed.describe):
        raise SearchError("give either texts, or pictures with --like or --describe.")
    where = _where(parsed)
    spec = parsed.model or read_manifest(Path(parsed.index)).model
    index = ImageIndex(parsed.index, load(spec, parsed.device, parsed.precision))
    searcher = Searcher(index, candidates=parsed.candidates, nearest=nearest(index, parsed.nearest))
    names = parsed.queries or [*parsed.like, *parsed.describe]
    texts = [line.rstrip("\n") for line in sys.stdin] if names == ["-"] else names
    if parsed.queries:
        found, names = searcher.by_text(texts, parsed.k, where), texts
    else:
        found = searcher.by_image(_pictures(parsed.like), parsed.k, where)
        found += searcher.texts_of(_pictures(parsed.describe), parsed.k)
    for name, hits in zip(names, found, strict=True):
        print(json.dumps({"query": name, "hits": [_row(hit) for hit in hits]}) if parsed.json else _text(name, hits))
    return 0


def _pictures(paths: Sequence[str]) -> list[Image.Image]:
    return [load_image(CaptionedImage(path, Location(path), ())) for path in paths]


def _where(parsed: argparse.Namespace) -> SearchFilter | None:
    box = tuple(float(part) for part in parsed.box.split(",")) if parsed.box else None
    if box is not None and len(box) != 4:
        raise SearchError(f"--box {parsed.box}: expected WEST,SOUTH,EAST,NORTH.")
    where = SearchFilter(classes=frozenset(parsed.classes), box=box, since=parsed.since, until=parsed.until)
    return None if where == SearchFilter() else where


def _row(hit: Hit) -> dict[str, Any]:
    row: dict[str, Any] = {"score": hit.score, "cosine": hit.cosine, "match": list(hit.match)}
    if hit.image is None:
        return row | {"text": hit.text}
    location = hit.image.location
    return row | {
        "image_id": hit.image.image_id,
        "class": hit.image.label,
        "url": location.url,
        "offset": location.offset,
    }


def _text(name: str, hits: Sequence[Hit]) -> str:
    lines = [name]
    for place, hit in enumerate(hits, start=1):
        scales = " ".join(f"{value:7.3f}" for value in hit.match)
        answer = hit.text if hit.image is None else ": ".join((hit.image.image_id, *hit.image.captions[:1]))
        lines.append(f"  {place:3}  {hit.score:8.3f}  cos {hit.cosine:6.3f}  {scales}  {answer}")
    return "\n".join(lines if hits else [*lines, "  nothing found"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="msa-openclip search",
        description="Search an index by texts ('-' reads them from standard input, one a line) or pictures.",
    )
    parser.add_argument("index", metavar="INDEX", help="folder of the index")
    parser.add_argument("queries", nargs="*", metavar="TEXT", help="what to look for")
    parser.add_argument("--like", nargs="+", default=[], metavar="FILE", help="find images like these pictures")
    parser.add_argument("--describe", nargs="+", default=[], metavar="FILE", help="find captions for these pictures")
    parser.add_argument("-k", type=int, default=10, help="answers a query (default: %(default)s)")
    parser.add_argument("--candidates", type=int, default=CANDIDATES, help="scored by MSCMAT (default: %(default)s)")
    parser.add_argument("--nearest", choices=KINDS, default="auto", help="global search (default: %(default)s)")
    parser.add_argument("--model", help="NAME=CHECKPOINT, if the weights of the index have moved")
    eval_options.add_loading(parser)
    group = parser.add_argument_group("filters")
    group.add_argument("--classes", nargs="+", default=[], help="only images of these classes")
    group.add_argument("--box", help="only images that overlap WEST,SOUTH,EAST,NORTH (write --box=-10,...)")
    group.add_argument("--since", help="only images of this ISO date or later (meta.date)")
    group.add_argument("--until", help="only images of this ISO date or earlier; 2020 includes that year")
    parser.add_argument("--json", action="store_true", help="print a JSON object a query")
    return parser
