"""The report as one HTML file: tables, plots and sample images, with nothing to load from anywhere."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import Any

from PIL import Image

from ..records import ShardError
from .report import Report, Seen

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .25em .9em; text-align: right }
th { border-bottom: 2px solid #4a6b4f } td:first-child, th:first-child { text-align: left }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 1em }
figure { margin: 0; background: #f4f5f1; border-radius: 6px; overflow: hidden }
figure img { width: 100%; display: block }
figcaption { padding: .6em .8em; font-size: 13px } .plots img { max-width: 49% }
"""


def page(report: Report) -> str:
    """The whole page.

    Raises:
        ShardError: matplotlib is not installed.
    """
    content = report.content
    title = f"Shards: {', '.join(content['folders'])}"
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>{escape(title)}</h1>",
        _table(content["splits"]),
        "<div class='plots'>",
        *(f"<img src='data:image/png;base64,{plot}' alt=''>" for plot in _plots(content["splits"])),
        "</div>",
        *_duplicates(content),
        *_rejected(content["rejected"]),
        "<h2>Samples</h2><div class='grid'>",
        *(_figure(seen) for seen in report.shown),
        "</div></html>",
    ]
    return "\n".join(parts)


def _table(splits: dict[str, Any]) -> str:
    heads = ("split", "samples", "images", "captions", "different", "blank", "words (median)", "MB", "classes")
    rows = [
        (split, row["samples"], row["images"], row["captions"], row["unique_captions"], row["blank_captions"],
         row["caption_words"]["median"], f"{row['image_mb']:.1f}", len(row["classes"]) or "-")
        for split, row in splits.items()
    ]  # fmt: skip
    tokens = [(split, row["caption_tokens"]) for split, row in splits.items() if "caption_tokens" in row]
    lines = [
        f"<p>{escape(split)}: {row['cut_off_share']:.1%} of the captions exceed the {row['context_length']} tokens of"
        f" {escape(row['tokenizer'])} and are cut off.</p>"
        for split, row in tokens
    ]
    return "<table>" + _row("th", heads) + "".join(_row("td", row) for row in rows) + "</table>" + "".join(lines)


def _row(tag: str, cells: tuple[Any, ...]) -> str:
    texts = (f"{cell:,}" if isinstance(cell, int) else escape(str(cell)) for cell in cells)
    return "<tr>" + "".join(f"<{tag}>{text}</{tag}>" for text in texts) + "</tr>"


def _plots(splits: dict[str, Any]) -> list[str]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ShardError("the HTML report draws with matplotlib: pip install matplotlib, or ask for JSON.") from error

    def drawn(figure: Any) -> str:
        out = io.BytesIO()
        FigureCanvasAgg(figure).print_png(out)  # type: ignore[no-untyped-call]
        return base64.b64encode(out.getvalue()).decode()

    plots = []
    for name, title in (("caption_words", "words in a caption"), ("caption_tokens", "tokens in a caption")):
        if not all(name in row for row in splits.values()):
            continue
        figure = Figure(figsize=(6, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for split, row in splits.items():
            total = sum(row[name]["histogram"].values())
            points = [(int(length), count / total) for length, count in row[name]["histogram"].items()]
            axes.plot(*zip(*points, strict=True), label=split, marker=".", markersize=4)
        if name == "caption_tokens":
            axes.axvline(next(iter(splits.values()))[name]["context_length"], color="crimson", ls="--", label="context")
        axes.set(xlabel=title, ylabel="share of captions")
        axes.legend(frameon=False)
        plots.append(drawn(figure))
    classes = sorted({name for row in splits.values() for name in row["classes"]})
    if classes:
        figure = Figure(figsize=(6, max(3.4, 0.19 * len(classes))), layout="constrained")
        axes = figure.add_subplot()
        left = [0] * len(classes)
        for split, row in splits.items():
            counts = [row["classes"].get(name, 0) for name in classes]
            axes.barh(classes, counts, left=left, label=split)
            left = [before + count for before, count in zip(left, counts, strict=True)]
        axes.invert_yaxis()
        axes.tick_params(labelsize=7)
        axes.set(xlabel="images")
        axes.legend(frameon=False)
        plots.append(drawn(figure))
    return plots


def _duplicates(content: dict[str, Any]) -> list[str]:
    parts = []
    for name, title in (("same_images", "The same image twice (checksum)"), ("look_alikes", "Look-alikes (hash)")):
        found = content.get(name)
        if found is None:
            continue
        parts.append(
            f"<h2>{title}</h2><p>{found['within']} groups within a split, {found['across']} across splits.</p>"
        )
        if found["groups"]:
            items = "".join(f"<li>{escape(' = '.join(group))}</li>" for group in found["groups"][:40])
            parts.append(f"<ul>{items}</ul>")
    return parts


def _rejected(reasons: dict[str, int]) -> list[str]:
    if not reasons:
        return []
    items = "".join(f"<li>{escape(reason)}: {count:,}</li>" for reason, count in reasons.items())
    return [f"<h2>Rejected</h2><ul>{items}</ul><p>Each is named in rejected.jsonl.</p>"]


def _figure(seen: Seen) -> str:
    with Image.open(io.BytesIO(seen.image)) as image:
        small = image.convert("RGB")
    small.thumbnail((320, 320))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=85)
    source = base64.b64encode(out.getvalue()).decode()
    captions = "<br>".join(map(escape, seen.captions))
    label = escape(f"{seen.split} {seen.image_id}")
    text = f"<figcaption><b>{label}</b><br>{captions}</figcaption>"
    return f"<figure><img src='data:image/jpeg;base64,{source}' alt=''>{text}</figure>"
