"""A local web page over an index (Gradio, extra `demo`): a sentence or image in, ranked images and reasons out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from ..data.pixels import load_image
from ..explain.explanation import explain
from ..explain.figure import figure, view
from ..search.filters import SearchFilter
from ..search.searcher import Hit, Searcher

TITLE = "Search aerial images"
_SHOWN = 12
_STYLE = ".caption-label { max-width: 100% !important; white-space: normal !important; left: 0 }"  # all of its scores


class DemoError(ValueError):
    """Gradio or matplotlib is missing."""


def find(searcher: Searcher, text: str, image: Image.Image | None, classes: str) -> list[Hit]:
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
    captions = "\n".join(f"- {caption}" for caption in hit.image.captions)
    metadata = f"**{hit.image.image_id}**, cosine {hit.cosine:.3f}\n\n{captions}"
    if not text.strip() or not searcher.scorer.has_match:
        return None, metadata
    image, model = load_image(hit.image), searcher.index.model
    return figure(explain(model, image, text), view(model, image)), metadata


def chart(hits: Sequence[Hit]) -> Any:
    """A map of the answers in their own coordinates; None if none of them is georeferenced."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    placed = [
        (rank, hit.image.metadata["geo"]["bounds"])
        for rank, hit in enumerate(hits, start=1)
        if hit.image is not None and "bounds" in (hit.image.metadata.get("geo") or {})
    ]
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

    def search(text: str, image: Image.Image | None, classes: str) -> tuple[Any, ...]:
        hits = find(searcher, text, image, classes)
        placed = chart(hits)
        note = "" if hits else "Nothing found." if text.strip() or image else "Type a sentence or drop a picture."
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
            image = gr.Image(label="or a picture", type="pil", height=240, scale=1)
        hits = gr.State([])
        with gr.Row():
            with gr.Column(scale=3):
                gr.Markdown("Answers: place, fused score (score of each scale, shallow to deep)")
                gallery = gr.Gallery(show_label=False, columns=4, height="auto", allow_preview=False)
            with gr.Column(scale=2):
                metadata = gr.Markdown()
                positions = gr.Plot(show_label=False, visible=False)
        why = gr.Plot(show_label=False)
        gr.HTML(f"<style>{_STYLE}</style>", padding=False)
        for ask in (button.click, text.submit):
            ask(search, [text, image, classes], [gallery, hits, metadata, positions, why])
        gallery.select(clicked, [hits, text], [why, metadata])
    return blocks
