"""The page of an evaluation: tables, recall curves, classes, and captions with answers and reasons in one HTML file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

from ..data.captioned import CaptionedImage
from ..data.pixels import load_image
from ..evaluation.eval_set import EvalSet
from . import report
from .examples import Example
from .explanation_table import STYLE, THUMBNAIL_PX, explanation_table, jpeg
from .report import ModelResult

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .7rem; text-align: right }
th { border-bottom: 1px solid #888; font-weight: 600 } td:first-child, th:first-child,
td:nth-child(2), th:nth-child(2) { text-align: left } .best { font-weight: 700 } .note { color: #666 }
figure { display: inline-block; margin: .3rem; text-align: center } figcaption { font-size: 12px; color: #666 }
.example { border-top: 1px solid #ddd; padding: .6rem 0 } .right img { outline: 3px solid #2a7 } img { max-width: 100% }
"""


class PlotError(ValueError):
    """matplotlib is missing."""


def page(data: EvalSet, results: Sequence[ModelResult]) -> str:
    """A self-contained HTML page.

    Raises:
        PlotError: matplotlib is not installed.
    """
    parts = [
        "<h1>Retrieval</h1>",
        f"<p>{escape(report.describe(data))}. Ties count {results[0].ties}; recalls in percent.</p>",
        _table(results, "metrics"),
        "<h2>Identical captions as one query</h2>",
        "<p class=note>Every image of a caption that occurs more than once is a right answer.</p>",
        _table(results, "merged"),
        "<h2>Recall by cutoff</h2>",
        _picture(_curves(results), "recall curves"),
    ]
    if any(result.by_class for result in results):
        parts += ["<h2>Mean recall by class</h2>", _picture(_classes(results), "mean recall by class")]
    for result in results:
        if result.examples is not None:
            for name, found in (("Surest", result.examples.surest), ("Hardest", result.examples.hardest)):
                parts.append(f"<h2>{name} captions for {escape(result.spec)} ({result.main_ranking})</h2>")
                parts += [_example(item) for item in found]
    head = f"<meta charset=utf-8><title>Retrieval</title><style>{_STYLE}{STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _table(results: Sequence[ModelResult], protocol: str) -> str:
    rows = [(result, ranking, metrics) for result in results for ranking, metrics in getattr(result, protocol).items()]
    names = (*report.COLUMNS, "i2t_median_rank", "i2t_mean_rank", "t2i_median_rank", "t2i_mean_rank")
    best = {name: max(metrics[name] for _, _, metrics in rows) for name in report.COLUMNS}
    head = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in ("model", "ranking", *names))
    body = []
    for result, ranking, metrics in rows:
        cells = [f"<td>{escape(result.spec)}</td><td>{ranking.replace('_', ' ')}</td>"]
        for name in names:
            interval = result.intervals.get(ranking, {}).get(name) if protocol == "metrics" else None
            title = f" title='95 %: {interval[0]:.2f} to {interval[1]:.2f}'" if interval else ""
            mark = " class=best" if metrics[name] == best.get(name) else ""
            cells.append(f"<td{mark}{title}>{metrics[name]:.2f}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><tr>{head}</tr>{''.join(body)}</table>"


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError("plots need matplotlib: pip install 'msa_openclip[plot]'.") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _curves(results: Sequence[ModelResult]) -> Any:
    figure, axes = _figure(11, 4, columns=2)
    for axis, way, title in zip(axes, ("i2t", "t2i"), ("image to text", "text to image"), strict=True):
        for result in results:
            for ranking, curves in result.curves.items():
                axis.plot(report.CURVE_CUTOFFS, curves[way], marker=".", label=f"{result.spec[-40:]}, {ranking}")
        axis.set(title=title, xlabel="k", ylabel="recall at k, %", xscale="log", ylim=(0, 102))
        axis.set_xticks(report.CURVE_CUTOFFS, [str(k) for k in report.CURVE_CUTOFFS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    return figure


def _classes(results: Sequence[ModelResult]) -> Any:
    names = sorted({name for result in results for name in result.by_class})
    figure, axes = _figure(9, 1.2 + 0.16 * len(names) * (1 + len(results)))
    height = 0.8 / len(results)
    for number, result in enumerate(results):
        values = [result.by_class.get(name, {}).get("mR", 0.0) for name in names]
        places = [index + number * height for index in range(len(names))]
        axes[0].barh(places, values, height=height, label=f"{result.spec[-40:]}, {result.main_ranking}")
    axes[0].set_yticks([index + 0.4 - height / 2 for index in range(len(names))], names)
    axes[0].invert_yaxis()
    axes[0].set(xlabel="mR of the queries of the class, %", xlim=(0, 100))
    axes[0].legend(fontsize=8)
    return figure


def _picture(figure: Any, alt: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return f"<img alt='{alt}' src='data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"


def _example(item: Example) -> str:
    shown = [_thumbnail(item.image, f"its image, rank {item.rank:g}", right=True)]
    shown += [
        _thumbnail(image, f"{place}. {image.image_id}", right=image is item.image)
        for place, image in enumerate(item.found, start=1)
    ]
    reasons = (explanation_table(reason) for reason in item.reasons)
    return f"<div class=example><p>{escape(item.caption)}</p>{''.join(shown)}{''.join(reasons)}</div>"


def _thumbnail(image: CaptionedImage, text: str, *, right: bool) -> str:
    picture = load_image(image)
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    mark = " class=right" if right else ""
    return f"<figure{mark}>{jpeg(picture, image.image_id)}<figcaption>{escape(text)}</figcaption></figure>"
