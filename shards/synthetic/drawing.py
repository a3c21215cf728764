"""Drawing for the synthetic aerial scenes: ground, roads, water, woods and objects with shadows, seen from above.

Coordinates are in units of the image side, (0, 0) the upper left corner.  Three layers are drawn together: colour,
shadow, and how rough the surface is; `Canvas.finish` joins them with noise, at half the drawn resolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[int, int, int]
Point = tuple[float, float]

GROUNDS: dict[str, Colour] = {
    "green grass": (88, 106, 62),
    "dry grass": (150, 138, 94),
    "bare soil": (142, 110, 82),
    "sand": (210, 188, 146),
    "concrete": (162, 158, 150),
    "asphalt": (92, 92, 96),
    "dark forest floor": (48, 62, 40),
    "gravel": (150, 142, 130),
}
WATERS: dict[str, Colour] = {"blue": (44, 82, 116), "green": (62, 96, 84), "brown": (116, 98, 72)}
PAINTS: dict[str, Colour] = {
    "white": (232, 232, 228), "grey": (140, 142, 146), "red": (168, 62, 48), "blue": (54, 88, 150),
    "brown": (112, 80, 58), "yellow": (212, 178, 62), "black": (44, 44, 48), "green": (66, 110, 72),
    "orange": (202, 116, 52),
}  # fmt: skip
_OVERSAMPLING = 2
_NOISE_PX = 1024


class Canvas:
    """One scene under the sun."""

    def __init__(self, size_px: int, rng: np.random.Generator, ground: Colour, rough: int = 150) -> None:
        self.rng = rng
        self.side = size_px * _OVERSAMPLING
        shape = (self.side, self.side)
        self._colour = Image.new("RGB", shape, self.vary(ground, 8))
        self._shade = Image.new("L", shape, 255)
        self._rough = Image.new("L", shape, rough)
        self._draw, self._shades, self._roughs = map(ImageDraw.Draw, (self._colour, self._shade, self._rough))
        sun = rng.uniform(0.08, 0.17) * 2 * math.pi  # shadows fall to the lower right, as on the canopy
        self._sun = (math.cos(sun), math.sin(sun))

    def vary(self, colour: Colour, amount: int) -> Colour:
        """A colour a little off, alike in all channels for the most part."""
        shift = int(self.rng.integers(-amount, amount + 1))
        return tuple(int(np.clip(c + shift + self.rng.integers(-3, 4), 0, 255)) for c in colour)  # type: ignore[return-value]

    def polygon(self, points: Sequence[Point], colour: Colour, *, rough: int = 60, height: float = 0.0) -> None:
        """A flat surface; `height` above ground throws a shadow."""
        pixels = [(x * self.side, y * self.side) for x, y in points]
        if height:
            dx, dy = (height * self.side * part for part in self._sun)
            for step in (0.4, 0.7, 1.0):
                self._shades.polygon([(x + dx * step, y + dy * step) for x, y in pixels], fill=105)
        self._draw.polygon(pixels, fill=colour)
        self._roughs.polygon(pixels, fill=rough)
        if height:
            self._shades.polygon(pixels, fill=255)

    def box(self, at: Point, size: Point, angle: float, colour: Colour, *, rough: int = 30, height: float = 0) -> None:
        """A turned rectangle."""
        self.polygon(turned(_corners(size), at, angle), colour, rough=rough, height=height)

    def disc(self, at: Point, radius: float, colour: Colour, *, rough: int = 40, height: float = 0.0) -> None:
        """A circle."""
        self.polygon(_circle(at, radius), colour, rough=rough, height=height)

    def road(self, points: Sequence[Point], width: float, colour: Colour, *, line: Colour | None = None) -> None:
        """A band along a polyline, with a dashed centre line if asked."""
        pixels = [(x * self.side, y * self.side) for x, y in points]
        broad = max(1, round(width * self.side))
        self._draw.line(pixels, fill=colour, width=broad, joint="curve")
        self._roughs.line(pixels, fill=45, width=broad, joint="curve")
        if line:
            (x0, y0), (x1, y1) = pixels[0], pixels[-1]
            dashes = max(3, round(math.hypot(x1 - x0, y1 - y0) / (0.06 * self.side)))
            for start in (step / dashes for step in range(dashes)):
                ends = [(x0 + (x1 - x0) * t, y0 + (y1 - y0) * t) for t in (start, start + 0.5 / dashes)]
                self._draw.line(ends, fill=line, width=max(1, round(broad * 0.08)))

    def rows(self, corners: Sequence[Point], angle: float, spacing: float, strength: int) -> None:
        """Crop rows inside a field: darker and lighter lines, clipped to the polygon."""
        mask = Image.new("L", self._colour.size, 0)
        pixels = [(x * self.side, y * self.side) for x, y in corners]
        ImageDraw.Draw(mask).polygon(pixels, fill=strength)
        stripes = _stripes(self.side, round(spacing * self.side), round(angle * 8 / math.pi) % 8)
        self._colour.paste(Image.new("RGB", self._colour.size, (30, 30, 15)), mask=_both(mask, stripes))

    def wood(self, points: Sequence[Point]) -> None:
        """Closed tree canopy inside a polygon."""
        mask = Image.new("L", self._colour.size, 0)
        pixels = [(x * self.side, y * self.side) for x, y in points]
        ImageDraw.Draw(mask).polygon(pixels, fill=255)
        dx, dy = (0.02 * self.side * part for part in self._sun)
        self._shades.polygon([(x + dx, y + dy) for x, y in pixels], fill=120)
        self._shades.polygon(pixels, fill=255)
        canopy = _canopy(self.side)
        left, top = (int(self.rng.integers(0, self.side)) for _ in range(2))
        self._colour.paste(canopy.crop((left, top, left + self.side, top + self.side)), mask=mask)
        self._rough.paste(130, mask=mask)

    def tree(self, at: Point, radius: float) -> None:
        """One tree."""
        green = self.vary((58, 80, 44), 14)
        self.disc(at, radius, green, rough=150, height=radius * 1.2)
        x, y = at[0] - self._sun[0] * radius * 0.3, at[1] - self._sun[1] * radius * 0.3
        self.disc((x, y), radius * 0.6, (green[0] + 18, green[1] + 20, green[2] + 10), rough=150)

    def house(self, at: Point, size: Point, angle: float, roof: Colour) -> None:
        """A gable roof: one half in the light, one away from it."""
        self.box(at, size, angle, roof, height=min(size) * 0.45)
        half = [(-size[0] / 2, 0.0), (size[0] / 2, 0.0), (size[0] / 2, size[1] / 2), (-size[0] / 2, size[1] / 2)]
        away = math.cos(angle) * self._sun[1] - math.sin(angle) * self._sun[0] > 0
        half = half if away else [(x, -y) for x, y in half]
        dark: Colour = (round(roof[0] * 0.78), round(roof[1] * 0.78), round(roof[2] * 0.78))
        self.polygon(turned(half, at, angle), dark, rough=30)

    def block(self, at: Point, size: Point, angle: float, roof: Colour) -> None:
        """A flat-roofed building with vents."""
        self.box(at, size, angle, roof, rough=40, height=min(size) * 0.4)
        self.box(at, (size[0] * 0.92, size[1] * 0.88), angle, _darker(roof, 16), rough=40)
        for step in (-0.3, 0.05, 0.32):
            spot = turned([(step * size[0], 0.18 * size[1])], at, angle)[0]
            self.box(spot, (0.02, 0.02), angle, (205, 205, 202), height=0.006)

    def tank(self, at: Point, radius: float, colour: Colour) -> None:
        """A storage tank: a bright lid, a rim and a round shadow."""
        self.disc(
            at, radius, (max(0, colour[0] - 45), max(0, colour[1] - 45), max(0, colour[2] - 45)), height=radius * 0.7
        )
        self.disc(at, radius * 0.93, colour, rough=15)
        self.disc(at, radius * 0.12, (max(0, colour[0] - 60), max(0, colour[1] - 60), max(0, colour[2] - 60)))

    def aircraft(self, at: Point, length: float, angle: float, colour: Colour) -> None:
        """An airliner, nose along `angle`."""
        shapes = (
            [(0.5, 0.0), (0.44, 0.05), (-0.44, 0.035), (-0.5, 0.0), (-0.44, -0.035), (0.44, -0.05)],
            [(0.14, 0.0), (-0.16, 0.46), (-0.27, 0.46), (-0.1, 0.0), (-0.27, -0.46), (-0.16, -0.46)],
            [(-0.34, 0.0), (-0.46, 0.17), (-0.52, 0.17), (-0.46, 0.0), (-0.52, -0.17), (-0.46, -0.17)],
        )
        placed = [turned([(x * length, y * length) for x, y in shape], at, angle) for shape in shapes]
        for height in (length * 0.1, 0.0):  # all shadows first, so that no part darkens another
            for shape in (placed[1], placed[2], placed[0]):
                self.polygon(shape, colour, rough=10, height=height)
                self._shades.polygon([(x * self.side, y * self.side) for x, y in shape], fill=255)

    def car(self, at: Point, angle: float, colour: Colour, length: float = 0.04) -> None:
        """A car: a body, and a darker windscreen."""
        self.box(at, (length, length * 0.46), angle, colour, rough=10, height=length * 0.18)
        glass: Colour = (round(colour[0] * 0.45), round(colour[1] * 0.45), round(colour[2] * 0.5))
        self.box(turned([(length * 0.12, 0.0)], at, angle)[0], (length * 0.2, length * 0.36), angle, glass)

    def boat(self, at: Point, angle: float, colour: Colour, length: float = 0.08, *, wake: bool = False) -> None:
        """A boat; a moving one draws a wake."""
        if wake:
            tail = [(-0.4, 0.08), (-1.6, 0.3), (-1.6, 0.18), (-0.5, 0.0), (-1.6, -0.18), (-1.6, -0.3), (-0.4, -0.08)]
            self.polygon(turned([(x * length, y * length) for x, y in tail], at, angle), (168, 186, 194), rough=80)
        hull = [(0.5, 0.0), (0.2, 0.17), (-0.5, 0.14), (-0.5, -0.14), (0.2, -0.17)]
        self.polygon(turned([(x * length, y * length) for x, y in hull], at, angle), colour, height=length * 0.08)
        self.box(turned([(-0.12 * length, 0)], at, angle)[0], (0.3 * length, 0.14 * length), angle, (90, 84, 76))

    def finish(self) -> Image.Image:
        """Join the layers: soft shadows, surface noise, a slight haze, half resolution."""
        noise = _noise(max(_NOISE_PX, 2 * self.side))
        left, top = (int(self.rng.integers(0, len(noise) - self.side + 1)) for _ in range(2))
        noise = noise[top : top + self.side, left : left + self.side]
        rough = np.asarray(self._rough, dtype=np.float32) * (0.30 / 255)
        shade = np.asarray(self._shade.filter(ImageFilter.BoxBlur(0.7)), dtype=np.float32) / 255
        light = (1 + rough * noise) * shade * float(self.rng.uniform(0.95, 1.08))
        pixels = np.asarray(self._colour, dtype=np.float32) * light[..., None]
        pixels = pixels * 0.83 + pixels.mean(axis=2, keepdims=True) * 0.12 + np.array([8, 10, 14], dtype=np.float32)
        joined = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        return joined.reduce(_OVERSAMPLING)


def turned(points: Sequence[Point], at: Point, angle: float) -> list[Point]:
    """Points around the origin, turned by `angle` and moved to `at`."""
    cos, sin = math.cos(angle), math.sin(angle)
    return [(at[0] + x * cos - y * sin, at[1] + x * sin + y * cos) for x, y in points]


def blob(at: Point, radius: float, rng: np.random.Generator, *, ragged: float = 0.25, points: int = 18) -> list[Point]:
    """A closed, wavy outline, as ponds and woods have."""
    phases = rng.uniform(0, 2 * math.pi, 3)
    outline = []
    for angle in np.linspace(0, 2 * math.pi, points, endpoint=False):
        wave = sum(math.sin((k + 2) * angle + phase) / (k + 1.5) for k, phase in enumerate(phases))
        reach = radius * (1 + ragged * wave)
        outline.append((at[0] + reach * math.cos(angle), at[1] + reach * math.sin(angle)))
    return outline


def _darker(colour: Colour, amount: int) -> Colour:
    red, green, blue = (max(0, part - amount) for part in colour)
    return red, green, blue


def _corners(size: Point) -> list[Point]:
    x, y = size[0] / 2, size[1] / 2
    return [(-x, -y), (x, -y), (x, y), (-x, y)]


def _circle(at: Point, radius: float) -> list[Point]:
    steps = 10 if radius < 0.03 else 24
    turns = [2 * math.pi * step / steps for step in range(steps)]
    return [(at[0] + radius * math.cos(turn), at[1] + radius * math.sin(turn)) for turn in turns]


def _both(mask: Image.Image, stripes: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(np.minimum(np.asarray(mask), stripes))


@cache
def _stripes(side: int, spacing: int, direction: int) -> NDArray[np.uint8]:
    y, x = np.mgrid[0:side, 0:side]
    angle = direction * math.pi / 8
    across = x * math.sin(angle) - y * math.cos(angle)
    return np.where(across % max(3, spacing) < max(1, spacing) / 2.2, 255, 0).astype(np.uint8)


@cache
def _noise(side: int) -> NDArray[np.float32]:
    """Noise of many scales, mean 0 and about -1..1: clumps of earth as well as grain."""
    rng = np.random.default_rng(7)
    total = np.zeros((side, side), dtype=np.float32)
    for cells, weight in ((8, 0.5), (24, 0.5), (96, 0.6), (256, 0.7), (1024, 0.6)):
        grid = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
        total += weight * np.asarray(grid.resize((side, side), Image.Resampling.BICUBIC))
    return np.asarray(total / total.std() * 0.55, dtype=np.float32)


@cache
def _canopy(side: int) -> Image.Image:
    """Trees crown to crown, twice as large as a scene so that crops differ."""
    rng = np.random.default_rng(11)
    wide = 2 * side
    image = Image.new("RGB", (wide, wide), (30, 40, 26))
    draw = ImageDraw.Draw(image)
    radius = 0.022 * side
    for x, y, light in rng.uniform(0, 1, (round(3.2 * (wide / radius / 2) ** 2), 3)):
        x, y, crown = x * wide, y * wide, radius * (0.7 + 0.7 * light)
        for part, shift, gain in ((1.0, 0.0, 0.62), (0.75, 0.18, 0.85), (0.45, 0.32, 1.08)):
            r, cx, cy = crown * part, x - crown * shift, y - crown * shift
            green = tuple(round(c * gain * (0.8 + 0.35 * light)) for c in (70, 94, 52))
            draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=green)
    return image
