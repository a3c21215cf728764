"""Line plots for pages, drawn with matplotlib; the page itself names the lines (macro `legend`).

So names of any length and with any characters can be shown: matplotlib would read `$` as the start of a formula.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..records import ShardError
from .render import data_url

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#555555")
"""After Okabe and Ito: told apart by people who do not see red or green."""


class Line(NamedTuple):
    """A line and what the legend shows of it."""

    name: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]
    dashes: str = ""
    """As SVG's stroke-dasharray, e.g. "6 3"; an unbroken line if empty."""


def colour(number: int) -> str:
    """The colour of the `number`-th model or split; they repeat after seven."""
    return _COLOURS[number % len(_COLOURS)]


def line_plot(lines: Sequence[Line], **axis: Any) -> str:
    """A `data:` URL of an SVG plot.

    Args:
        axis: properties of the matplotlib Axes, e.g. xlabel, ylim; fixed texts only, for they may hold formulas.
    Raises:
        ShardError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ShardError("the page has plots, which need matplotlib: pip install 'msa_openclip[plot]'.") from error
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    for line in lines:
        dashes = (0, tuple(map(float, line.dashes.split()))) if line.dashes else "-"
        axes.plot(line.x, line.y, color=line.colour, linestyle=dashes, marker=".")
    axes.set(**axis)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return data_url("image/svg+xml", buffer.getvalue())
