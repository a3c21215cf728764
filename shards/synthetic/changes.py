"""Synthetic places at several dates with a named change: data for change pairs and time series.

A place is a road with six plots beside it.  Between two dates one plot changes its use, or none does.  Light, colours
and surface differ at every date, so that pixels change everywhere and only uses tell what happened.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..records import SPLITS
from .drawing import GROUNDS, PAINTS, WATERS, Canvas, Colour, Point, blob, turned
from .words import NUMBERS, line_through, pick, place

USES = ("grass", "building", "forest", "houses", "pond", "parking")
"""What a plot can be; grass is what everything appears on."""
NOTHING = "no change"
"""The class of a place that stays as it is; of others it is the use before and the use after, `forest to houses`."""
_NOUNS = {
    "building": ("a {paint} building", "the {paint} building"),
    "forest": ("a forest", "the forest"),
    "houses": ("houses", "the houses"),
    "pond": ("a pond", "the pond"),
    "parking": ("a parking lot", "the parking lot"),
}
_CHANGES = [(before, after) for before in USES for after in USES if before != after]
_STILL = 8
"""Every so many places nothing changes."""


MOST_DATES = 12


class Changed(NamedTuple):
    """One drawn place."""

    images: tuple[Image.Image, ...]
    """In order of date."""
    label: str
    captions: tuple[str, ...]


class _Site(NamedTuple):
    """What stays as it is over the years."""

    ground: str
    angle: float
    """Of the road."""
    uses: tuple[str, ...]
    """Of each plot, at first."""
    paint: str
    """Of the building that comes or goes."""


_PLOTS = [(x, y) for y in (-0.3, 0.3) for x in (-0.32, 0.0, 0.32)]


def change(index: int, *, dates: int = 2, seed: int = 0, split: str = "train", size_px: int = 96) -> Changed:
    """Draw place number `index` of a split at several dates; kinds of change take turns.

    Returns:
        `dates` RGB images of size_px x size_px, the kind of change, and five captions.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index, dates])
    site = _Site(
        pick(rng, "green grass", "dry grass"),
        math.pi / 2 * int(rng.integers(2)),
        tuple(pick(rng, *USES) for _ in _PLOTS),
        pick(rng, "red", "white", "blue", "yellow"),
    )
    plot, when = int(rng.integers(len(_PLOTS))), int(rng.integers(1, dates))
    if index % _STILL == _STILL - 1:
        uses, label = (site.uses,) * dates, NOTHING
        captions = _still_captions(site, rng)
    else:
        before, after = _CHANGES[(index - index // _STILL) % len(_CHANGES)]
        uses = (_with(site.uses, plot, before),) * when + (_with(site.uses, plot, after),) * (dates - when)
        label, where = f"{before} to {after}", place(_at(plot, site.angle))
        captions = _captions(before, after, site.paint, where, _time(when, dates), rng)
    shapes = [int(rng.integers(2**32)) for _ in _PLOTS]  # what stands on a plot looks alike at all dates
    images = tuple(_draw(site, now, shapes, rng, size_px) for now in uses)
    return Changed(images, label, tuple(text[0].upper() + text[1:] + "." for text in captions))


def _with(uses: tuple[str, ...], plot: int, use: str) -> tuple[str, ...]:
    return (*uses[:plot], use, *uses[plot + 1 :])


def _at(plot: int, angle: float) -> Point:
    return turned([_PLOTS[plot]], (0.5, 0.5), angle)[0]


def _draw(site: _Site, uses: tuple[str, ...], shapes: list[int], rng: np.random.Generator, size_px: int) -> Image.Image:
    canvas = Canvas(size_px, rng, GROUNDS[site.ground])
    canvas.road(line_through(site.angle), 0.1, canvas.vary((108, 108, 112), 10), line=(226, 224, 210))
    for plot, use in enumerate(uses):
        if use != "grass":
            _DRAWN[use](canvas, _at(plot, site.angle), site, np.random.default_rng(shapes[plot]))
    return canvas.finish()


def _building(canvas: Canvas, at: Point, site: _Site, shape: np.random.Generator) -> None:
    canvas.block(at, (0.2, 0.17), site.angle, canvas.vary(PAINTS[site.paint], 8))


def _forest(canvas: Canvas, at: Point, site: _Site, shape: np.random.Generator) -> None:
    canvas.wood(blob(at, 0.13, shape, ragged=0.12))


def _houses(canvas: Canvas, at: Point, site: _Site, shape: np.random.Generator) -> None:
    for x, y in ((-0.06, -0.06), (0.06, -0.06), (-0.06, 0.06), (0.06, 0.06)):
        spot = (at[0] + x + shape.uniform(-0.01, 0.01), at[1] + y + shape.uniform(-0.01, 0.01))
        canvas.house(spot, (0.085, 0.065), site.angle, canvas.vary(PAINTS["brown"], 10))


def _pond(canvas: Canvas, at: Point, site: _Site, shape: np.random.Generator) -> None:
    canvas.polygon(blob(at, 0.115, shape, ragged=0.15), canvas.vary(WATERS["blue"], 8), rough=10)


def _parking(canvas: Canvas, at: Point, site: _Site, shape: np.random.Generator) -> None:
    canvas.box(at, (0.23, 0.2), site.angle, canvas.vary(GROUNDS["asphalt"], 8), rough=45)
    colours: list[Colour] = [PAINTS[name] for name in ("white", "black", "grey")]
    for x in (-0.08, -0.027, 0.027, 0.08):
        for y in (-0.05, 0.05):
            spot = turned([(x, y)], at, site.angle)[0]
            canvas.car(spot, site.angle + math.pi / 2, colours[int(shape.integers(3))], 0.07)


_DRAWN = {"building": _building, "forest": _forest, "houses": _houses, "pond": _pond, "parking": _parking}


def _noun(use: str, paint: str, *, known: bool) -> str:
    return _NOUNS[use][known].format(paint=paint)


def _time(when: int, dates: int) -> str:
    """When it happened; nothing to say of a pair."""
    return "" if dates == 2 else f" between dates {NUMBERS[when]} and {NUMBERS[when + 1]}"


def _captions(before: str, after: str, paint: str, where: str, time: str, rng: np.random.Generator) -> list[str]:
    if before == "grass":
        new = _noun(after, paint, known=False)
        texts = [
            f"{new} appeared {where}{time}",
            f"{new} appeared beside the road {where}{time}",
            f"{where} {new} replaced the grass{time}",
            f"{new} came to stand on the grass {where}{time}",
            f"the grass {where} became {new}{time}",
        ]
    elif after == "grass":
        old = _noun(before, paint, known=True)
        texts = [
            f"{old} {where} disappeared{time}",
            f"{old} beside the road {where} disappeared{time}",
            f"{where} grass replaced {old}{time}",
            f"{old} {where} gave way to grass{time}",
            f"{old} {where} became grass{time}",
        ]
    else:
        old, new = _noun(before, paint, known=True), _noun(after, paint, known=False)
        texts = [
            f"{old} {where} became {new}{time}",
            f"{where} {new} replaced {old}{time}",
            f"{old} beside the road {where} became {new}{time}",
            f"{old} {where} gave way to {new}{time}",
            f"{new} came to stand {where} in the place of {old}{time}",
        ]
    return [texts[k] for k in rng.permutation(5)]


def _still_captions(site: _Site, rng: np.random.Generator) -> list[str]:
    there = [plot for plot, use in enumerate(site.uses) if use != "grass"]
    seen = "the road"
    if there:
        plot = there[int(rng.integers(len(there)))]
        seen = f"{_noun(site.uses[plot], site.paint, known=True)} {place(_at(plot, site.angle))}"
    return [
        "nothing changed",
        f"nothing changed, {seen} can still be seen",
        "the place is the same as before",
        f"{seen} can still be seen and nothing else changed",
        f"nothing changed beside the road or on the {site.ground}",
    ]
