"""`msa-openclip demo`: the search page of an index on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..evaluation.loading import load
from ..search.files import read_manifest
from ..search.index import ImageIndex
from ..search.nearest import nearest
from ..search.searcher import Searcher
from . import options as eval_options
from .demo_page import page


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until interrupted."""
    parsed = _parser().parse_args(arguments)
    spec = parsed.model or read_manifest(Path(parsed.index)).model
    index = ImageIndex(parsed.index, load(spec, parsed.device))
    page(Searcher(index, nearest=nearest(index))).launch(server_name=parsed.host, server_port=parsed.port)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="msa-openclip demo",
        description="A web page over an index: type a sentence or drop a picture, click an answer to see why.",
    )
    parser.add_argument("index", metavar="INDEX", help="folder of the index")
    parser.add_argument("--model", help="NAME=CHECKPOINT, if the weights of the index have moved")
    eval_options.add_device(parser)
    parser.add_argument("--host", default="127.0.0.1", help="whom to serve, 0.0.0.0: all (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="default: %(default)s")
    return parser
