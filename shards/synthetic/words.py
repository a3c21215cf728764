"""Words for the synthetic scenes: counts, places and directions, and the facts a scene is described by."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from .drawing import Point, turned

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
DIRECTIONS = (
    ("from left to right", 0.0),
    ("from the upper left to the lower right", math.pi / 4),
    ("from top to bottom", math.pi / 2),
    ("from the lower left to the upper right", -math.pi / 4),
)


class Facts(NamedTuple):
    """Noun phrases for what was drawn, and how the small things lie to the rest."""

    place: str
    large: str
    middle: str
    small: str
    relation: str


def count_of(number: int, noun: str, plural: str = "") -> str:
    return f"{NUMBERS[number]} {noun if number == 1 else plural or noun + 's'}"


def a(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeio' else 'a'} {phrase}"


def pick(rng: np.random.Generator, *names: str) -> str:
    return names[int(rng.integers(len(names)))]


def place(at: Point) -> str:
    """Where a point lies, in words."""
    row = "upper" if at[1] < 0.38 else "lower" if at[1] > 0.62 else ""
    column = "left" if at[0] < 0.38 else "right" if at[0] > 0.62 else ""
    if row and column:
        return f"in the {row} {column}"
    if row:
        return "at the top" if row == "upper" else "at the bottom"
    return f"on the {column}" if column else "in the middle"


def corner(rng: np.random.Generator) -> Point:
    x, y = (0.25 if rng.random() < 0.5 else 0.75 for _ in range(2))
    return x, y


def line_through(angle: float, length: float = 1.6, at: Point = (0.5, 0.5)) -> list[Point]:
    """Both ends of a line through `at`."""
    return turned([(-length / 2, 0.0), (length / 2, 0.0)], at, angle)
