"""`msa-openclip demo`: an index as a map and a list in the browser of this machine."""

from __future__ import annotations

import argparse

from ..shards.arguments import Commands, add_command, add_number
from .options import add_device, add_moved_model


def add(commands: Commands) -> None:
    """Arguments and help."""
    text = "a map over an index: type a sentence or choose an image, draw a box, click an answer to see why"
    command = add_command(commands, "demo", run, text, examples=["msa-openclip demo tiles.index"])
    command.add_argument("index", metavar="INDEX", help="folder of the index")
    add_moved_model(command)
    add_device(command)
    text = "address to serve on, 0.0.0.0 for all networks (default: %(default)s)"
    command.add_argument("--host", default="127.0.0.1", help=text)
    text = "names by which browsers may call this machine, beside localhost and addresses"
    command.add_argument("--allow-host", nargs="+", default=[], metavar="NAME", help=text)
    add_number(command, "--port", "port to serve on, 0 for any that is free", default=7860, least=0, most=65535)
    text = (
        "map tiles below, from a server that browsers then ask, with {z}, {x}, {y} (default: none, nothing is fetched)"
    )
    command.add_argument("--tiles", default="", metavar="URL", help=text)
    command.add_argument("--tiles-credit", default="", metavar="TEXT", help="whom the map names as their source")


def run(parsed: argparse.Namespace) -> None:
    """Serve until interrupted."""
    from ..demo.app import serve
    from ..search.index import ImageIndex
    from ..search.known_models import model_of, remember
    from ..search.nearest import nearest
    from ..search.searcher import Searcher
    from .inputs import load_model

    index = ImageIndex(parsed.index, load_model(model_of(parsed.index, parsed.model), parsed))
    remember(index.model)
    searcher = Searcher(index, nearest=nearest(index))
    serve(searcher, parsed.host, parsed.port, parsed.allow_host, parsed.tiles, parsed.tiles_credit)
