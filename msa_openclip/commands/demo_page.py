"""A local web page over an index (Gradio, extra `demo`): a sentence or image in, ranked images and reasons out."""

from __future__ import annotations

import ipaddress
import os
import socket
import tempfile
from collections.abc import Awaitable, Callable, Collection, Sequence
from html import escape
from typing import Any

from PIL import Image

from ..data.pixels import load_dates, load_image
from ..data.readers import are_bounds
from ..explain.explanation import explain
from ..explain.figure import figure, view
from ..search.filters import SearchFilter
from ..search.searcher import Hit, Picture, Searcher
from ..shards.output import printable

TITLE = "Search aerial images"
_SHOWN = 12
_LARGEST_UPLOAD = "20mb"
_TEMPORARY = "GRADIO_TEMP_DIR"
_Asgi = Callable[[dict[str, Any], Any, Any], Awaitable[None]]
_STYLE = ".caption-label { max-width: 100% !important; white-space: normal !important; left: 0 }"  # all of its scores


class DemoError(ValueError):
    """Gradio or matplotlib is missing."""


def find(searcher: Searcher, text: str, image: Picture | None, classes: str) -> list[Hit]:
    """The answers to the sentence, or to the image where no sentence was typed; classes are separated by commas."""
    names = frozenset(name.strip() for name in classes.split(",") if name.strip())
    where = SearchFilter(classes=names) if names else None
    if text.strip():
        return searcher.by_text([text], _SHOWN, where)[0]
    return searcher.by_image([image], _SHOWN, where)[0] if image is not None else []


def tiles(hits: Sequence[Hit]) -> list[tuple[Image.Image, str]]:
    """Images with their captions in the gallery: rank, fused score, and the score of each scale."""
    shown = []
    for rank, hit in enumerate(hits, start=1):
        assert hit.image is not None
        scales = " ".join(f"{value:.1f}" for value in hit.match)
        below = f"{rank}. {hit.score:.2f}" + (f" ({scales})" if scales else "")
        shown.append((load_image(hit.image), below))
    return shown


def reasons(searcher: Searcher, hit: Hit, text: str) -> tuple[Any, str]:
    """Figure of the reasons, and captions, for the answer that was clicked; no figure without sentence or MSCMAT."""
    assert hit.image is not None
    captions = "".join(f"<li>{escape(printable(caption))}</li>" for caption in hit.image.captions)
    metadata = f"<b>{escape(printable(hit.image.image_id))}</b>, cosine {hit.cosine:.3f}<ul>{captions}</ul>"
    if not text.strip() or not searcher.scorer.has_match:
        return None, metadata
    pictures, model = load_dates(hit.image), searcher.index.model
    return figure(explain(model, pictures, text), view(model, pictures)), metadata


def chart(hits: Sequence[Hit]) -> Any:
    """A map of the answers in their own coordinates; None if none of them is georeferenced."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    geo = [(rank, (hit.image.metadata if hit.image else {}).get("geo") or {}) for rank, hit in enumerate(hits, start=1)]
    placed = [(rank, known["bounds"]) for rank, known in geo if are_bounds(known.get("bounds"))]
    if not placed:
        return None
    drawn = Figure(figsize=(5, 3.6), layout="constrained")
    axis = drawn.subplots()
    for rank, (west, south, east, north) in placed:
        axis.add_patch(Rectangle((west, south), east - west, north - south, fill=False, color="#2a7f62"))
        axis.annotate(str(rank), ((west + east) / 2, (south + north) / 2), ha="center", va="center")
    axis.autoscale_view()
    axis.ticklabel_format(style="plain", useOffset=False)
    axis.tick_params(axis="x", rotation=30)
    axis.set(xlabel="east", ylabel="north", aspect="equal")
    return drawn


def serve(searcher: Searcher, host: str, port: int, names: Sequence[str] = ()) -> None:
    """Serve `page` until interrupted; what it keeps of pictures lies in a folder of this user's, and goes with it.

    Args:
        searcher: over the index.
        host: whom to serve: an address of this machine.
        port: where.
        names: by which browsers may call this machine, beside `localhost`, its own name and any address.
    """
    before = os.environ.get(_TEMPORARY)
    try:
        with tempfile.TemporaryDirectory(prefix="msa-openclip-demo-") as folder:  # of mode 0700
            os.environ[_TEMPORARY] = folder
            known = {"localhost", host.lower(), socket.gethostname().lower(), *map(str.lower, names)}
            page(searcher).launch(
                server_name=host,
                server_port=port,
                max_file_size=_LARGEST_UPLOAD,
                app_kwargs={"middleware": [_middleware(known)]},
            )
    finally:
        if before is None:
            os.environ.pop(_TEMPORARY, None)
        else:
            os.environ[_TEMPORARY] = before


def _middleware(names: Collection[str]) -> Any:
    from starlette.middleware import Middleware  # comes with gradio

    return Middleware(KnownHosts, names=names)


class KnownHosts:
    """Answers requests for this machine alone, not for a name that somebody else's page has just pointed to it.

    Without it any web page could ask the demo through the visitor's browser (DNS rebinding).  An address in the place
    of a name is harmless: only names can be pointed elsewhere.
    """

    def __init__(self, app: _Asgi, names: Collection[str]) -> None:
        self.app, self.names = app, names

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] not in ("http", "websocket") or self._is_known(scope["headers"]):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            text = b"This name is not known here; see `msa-openclip demo --allow-host`.\n"
            await send({"type": "http.response.start", "status": 421, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": text})

    def _is_known(self, headers: Sequence[tuple[bytes, bytes]]) -> bool:
        hosts = [value.decode("latin-1").strip().lower() for name, value in headers if name.lower() == b"host"]
        if len(hosts) != 1:
            return False
        name = hosts[0].rpartition(":")[0] if hosts[0].rpartition(":")[2].isdigit() else hosts[0]
        try:
            ipaddress.ip_address(name.strip("[]"))
            return True
        except ValueError:
            return name in self.names


def page(searcher: Searcher) -> Any:
    """The page as gradio.Blocks; `launch()` serves it.

    Raises:
        DemoError: gradio or matplotlib is not installed.
    """
    try:
        import gradio as gr  # type: ignore[import-not-found,unused-ignore]
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise DemoError(f"{error.name} is missing: pip install 'msa_openclip[demo]'.") from error

    dates = searcher.scorer.dates

    def search(text: str, classes: str, *pictures: Image.Image | None) -> tuple[Any, ...]:
        given = [picture for picture in pictures if picture is not None]
        hits = find(searcher, text, given if len(given) == dates else None, classes)
        placed = chart(hits)
        note = "" if hits else "Nothing found." if text.strip() or given else "Type a sentence or drop a picture."
        return tiles(hits), hits, note, gr.update(value=placed, visible=placed is not None), None

    def clicked(hits: list[Hit], text: str, event: Any) -> tuple[Any, str]:
        return reasons(searcher, hits[event.index], text)

    clicked.__annotations__["event"] = gr.SelectData  # how gradio tells what to pass; a string would not resolve
    with gr.Blocks(title=TITLE, analytics_enabled=False) as blocks:
        gr.Markdown(f"# {TITLE}\n{len(searcher.index):,} images. Click an answer to see why it was found.")
        with gr.Row():
            with gr.Column(scale=3):
                text = gr.Textbox(label="Sentence", placeholder="many planes are parked beside a terminal")
                classes = gr.Textbox(label="Classes (optional, with commas)")
                button = gr.Button("Search", variant="primary")
            labels = ["or a picture"] if dates == 1 else [f"or pictures: date {date + 1}" for date in range(dates)]
            images = [gr.Image(label=label, type="pil", height=240, scale=1) for label in labels]
        hits = gr.State([])
        with gr.Row():
            with gr.Column(scale=3):
                gr.Markdown("Answers: place, fused score (score of each scale, shallow to deep)")
                gallery = gr.Gallery(show_label=False, columns=4, height="auto", allow_preview=False)
            with gr.Column(scale=2):
                metadata = gr.HTML()
                positions = gr.Plot(show_label=False, visible=False)
        why = gr.Plot(show_label=False)
        gr.HTML(f"<style>{_STYLE}</style>", padding=False)
        for ask in (button.click, text.submit):
            ask(search, [text, classes, *images], [gallery, hits, metadata, positions, why])
        gallery.select(clicked, [hits, text], [why, metadata])
    return blocks
