"""`msa-openclip search`: texts or images against an index."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..search.options import CANDIDATES, FORMATS
from ..shards.arguments import Commands, add_command, add_number
from ..shards.exit_codes import UsageError
from ..shards.output import printable
from .options import add_loading, add_moved_model, add_nearest

if TYPE_CHECKING:
    from PIL import Image

    from ..search.filters import SearchFilter
    from ..search.index import ImageIndex
    from ..search.searcher import Hit


def add(commands: Commands) -> None:
    """Arguments and help."""
    command = add_command(
        commands,
        "search",
        run,
        "texts or images against an index",
        description="Search an index by texts ('-' reads them from standard input, one a line) or images.",
        examples=[
            "msa-openclip search tiles.index 'many planes beside a terminal' --classes airport --since 2020",
            "msa-openclip search tiles.index --like tile.jpg -k 20 --json",
            "msa-openclip search tiles.index 'a river' --bbox 12,50,14,52 --where 'cloud < 10' --format geojson",
        ],
    )
    command.add_argument("index", metavar="INDEX", help="folder of the index")
    command.add_argument("queries", nargs="*", metavar="TEXT", help="what to look for")
    command.add_argument(
        "--like",
        nargs="+",
        default=[],
        metavar="FILE",
        help="find images like these (of several dates: one file of each)",
    )
    command.add_argument("--describe", nargs="+", default=[], metavar="FILE", help="find captions for these images")
    add_number(command, "-k", "answers a query", default=10)
    add_number(command, "--candidates", "the nearest by global features that MSCMAT scores", default=CANDIDATES)
    text = "how answers are printed: a table, a JSON object for each query, GeoJSON or a STAC ItemCollection of all"
    command.add_argument("--format", choices=FORMATS, default="table", help=f"{text} (default: %(default)s)")
    command.add_argument("--json", action="store_const", const="json", dest="format", help="--format json")
    command.add_argument("--out", metavar="FILE", help="write answers there")
    add_nearest(command)
    add_moved_model(command)
    add_loading(command)
    group = command.add_argument_group("filters")
    group.add_argument("--classes", nargs="+", default=[], metavar="CLASS", help="only images of these classes")
    text = (
        "only images that overlap it, in degrees of WGS84; west > east crosses the antimeridian; "
        "write --bbox=-10,... where it starts with a minus"
    )
    group.add_argument("--bbox", type=_bbox, metavar="WEST,SOUTH,EAST,NORTH", help=text)
    text = "only images that overlap it: a GeoJSON file, or WKT, in degrees of WGS84"
    group.add_argument("--polygon", metavar="FILE|WKT", help=text)
    group.add_argument("--since", metavar="DATE", help="only images of this ISO date or later (meta.date)")
    text = "only images of this ISO date or earlier; 2020 includes that year"
    group.add_argument("--until", metavar="DATE", help=text)
    text = 'only images of which this is true, in DuckDB\'s SQL on the columns of the index: "cloud < 10"'
    group.add_argument("--where", metavar="EXPRESSION", help=text)


def _bbox(text: str) -> tuple[float, ...]:
    try:
        west, south, east, north = (float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected WEST,SOUTH,EAST,NORTH") from error
    if not south <= north:
        raise argparse.ArgumentTypeError(f"{text!r}: expected south <= north")
    return west, south, east, north


def run(parsed: argparse.Namespace) -> None:
    """Search and print."""
    if bool(parsed.queries) == bool(parsed.like or parsed.describe):
        raise UsageError("give either texts, or images with --like or --describe")
    if parsed.describe and parsed.format in ("geojson", "stac"):
        raise UsageError(f"--describe finds captions, of which --format {parsed.format} has none; take table or json")

    from ..search.index import ImageIndex
    from ..search.known_models import model_of, remember
    from ..search.nearest import nearest
    from ..search.searcher import Searcher
    from .inputs import load_model

    index = ImageIndex(parsed.index, load_model(model_of(parsed.index, parsed.model), parsed))
    remember(index.model)
    searcher = Searcher(index, candidates=parsed.candidates, nearest=nearest(index, parsed.nearest))
    where = _filter(parsed)
    if parsed.bbox or parsed.polygon:
        _say_unknown(index, "bbox", "place on Earth")
    if parsed.since or parsed.until:
        _say_unknown(index, "datetime", "date")
    names = parsed.queries
    if parsed.queries:
        names = [line.rstrip("\n") for line in sys.stdin] if names == ["-"] else names
        answers = searcher.by_text(names, parsed.k, where)
    else:
        dates = searcher.scorer.dates
        like, describe = _samples("--like", parsed.like, dates), _samples("--describe", parsed.describe, dates)
        answers = searcher.by_image([_pictures(paths) for paths in like], parsed.k, where)
        answers += searcher.texts_of([_pictures(paths) for paths in describe], parsed.k)
        names = [" ".join(paths) for paths in (*like, *describe)]
    text = _shown(parsed.format, names, answers)
    if parsed.out:
        from ..shards.storage import store

        store.write_bytes(parsed.out, f"{text}\n".encode())
    elif text:
        print(text)


def _say_unknown(index: ImageIndex, column: str, what: str) -> None:
    """How many images a filter leaves out because they lack what it asks for."""
    unknown = index.images.columns([column])[column].null_count if len(index) else 0
    if unknown:
        print(f"left out: {unknown} of {len(index)} images, of which no {what} is known", file=sys.stderr)


def _shown(how: str, names: Sequence[str], answers: Sequence[Sequence[Hit]]) -> str:
    from ..search.results import geojson, item_collection

    pairs = zip(names, answers, strict=True)
    if how in ("geojson", "stac"):
        return json.dumps((geojson if how == "geojson" else item_collection)(pairs), default=str)
    if how == "json":
        return "\n".join(json.dumps({"query": name, "hits": [_row(hit) for hit in hits]}) for name, hits in pairs)
    return "\n".join(_text(name, hits) for name, hits in pairs)


def _samples(option: str, paths: Sequence[str], dates: int) -> list[Sequence[str]]:
    """The files of each sample, one of each date."""
    if len(paths) % dates:
        raise UsageError(
            f"{option}: {len(paths)} files, where the index has samples of {dates} dates; name one of each"
        )
    return [paths[start : start + dates] for start in range(0, len(paths), dates)]


def _pictures(paths: Sequence[str]) -> list[Image.Image]:
    from ..data.captioned import CaptionedImage
    from ..data.pixels import load_image
    from ..shards.records import Location

    return [load_image(CaptionedImage(path, Location(path), ())) for path in paths]


def _filter(parsed: argparse.Namespace) -> SearchFilter | None:
    from ..search.filters import SearchFilter

    where = SearchFilter(
        classes=frozenset(parsed.classes),
        bbox=parsed.bbox,
        polygon=_polygon(parsed.polygon) if parsed.polygon else None,
        since=parsed.since,
        until=parsed.until,
        where=parsed.where,
    )
    return None if where == SearchFilter() else where


def _polygon(named: str) -> str:
    """The text of a file, or WKT as it was given."""
    from ..data.small_files import read_text

    if os.path.exists(named):
        return read_text(named)
    if "(" not in named and "{" not in named:
        raise UsageError(f"--polygon {named}: no such file, and no WKT such as 'POLYGON((12 50, 14 50, 14 52, 12 50))'")
    return named


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
        "window": list(location.window) if location.window else None,
    }


def _text(name: str, hits: Sequence[Hit]) -> str:
    lines = [printable(name)]
    for rank, hit in enumerate(hits, start=1):
        scales = " ".join(f"{value:7.3f}" for value in hit.match)
        answer = hit.text if hit.image is None else ": ".join((hit.image.image_id, *hit.image.captions[:1]))
        lines.append(f"  {rank:3}  {hit.score:8.3f}  cos {hit.cosine:6.3f}  {scales}  {printable(answer or '')}")
    return "\n".join(lines if hits else [*lines, "  nothing found"])
