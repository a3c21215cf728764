"""The report as one HTML file: tables, plots and sample images, with nothing to load from anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..imagery.prepare import open_image, side_by_side
from ..pages.plots import Line, colour, line_plot
from ..pages.render import jpeg_url, render
from .report import Report, Seen, warnings

TITLE = "Shards: "
"""Begins the titles of these pages, by which they are known."""
_THUMBNAIL_PX = 320


def page(report: Report) -> str:
    """The page of a report.

    Raises:
        ShardError: matplotlib is not installed.
    """
    content = report.content
    splits = content["splits"]
    titles = {"same_images": "The same image twice (checksum)", "look_alikes": "Look-alikes (hash)"}
    return render(
        "shards.html",
        title=f"{TITLE}{', '.join(content['folders'])}",
        splits=splits,
        lines=_lines(splits, "caption_words"),
        plots=list(_plots(splits)),
        classes=list(_classes(splits)),
        doubles=[(title, content[name]) for name, title in titles.items() if name in content],
        shared=content["shared"],
        warnings=warnings(content),
        rejected=content["rejected"],
        samples=[(sample, _thumbnail(sample)) for sample in report.shown],
    )


def _lines(splits: dict[str, Any], measure: str) -> list[Line]:
    """The share of captions by length, a line for each split."""
    lines = []
    for number, (split, row) in enumerate(splits.items()):
        histogram = row[measure]["histogram"]
        total = sum(histogram.values())
        shares = [count / total for count in histogram.values()]
        lines.append(Line(split, colour(number), [int(length) for length in histogram], shares))
    return lines


def _plots(splits: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Title and URL of the plots of caption lengths."""
    axis = {"ylabel": "share of captions"}
    yield "words in a caption", line_plot(_lines(splits, "caption_words"), xlabel="words", **axis)
    if all("caption_tokens" in row for row in splits.values()):
        context = next(iter(splits.values()))["caption_tokens"]["context_length"]
        label = f"tokens (the model reads {context})"
        yield "tokens in a caption", line_plot(_lines(splits, "caption_tokens"), xlabel=label, **axis)


def _classes(splits: dict[str, Any]) -> Iterator[tuple[str, list[tuple[float, str]], int]]:
    """Of each class its name, its bar with a part for each split, and its number of images."""
    names = sorted({name for row in splits.values() for name in row["classes"]})
    counts = {name: [row["classes"].get(name, 0) for row in splits.values()] for name in names}
    largest = max(map(sum, counts.values()), default=0)
    for name, of_splits in counts.items():
        parts = [(100 * count / largest, colour(number)) for number, count in enumerate(of_splits)]
        yield name, parts, sum(of_splits)


def _thumbnail(sample: Seen) -> str | None:
    """A URL of the sample's image, its dates side by side; None where there is none that Pillow reads."""
    try:
        return jpeg_url(side_by_side([open_image(data) for data in sample.images]), _THUMBNAIL_PX * len(sample.images))
    except Exception:  # Pillow raises nearly everything for one broken file or another
        return None
