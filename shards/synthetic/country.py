"""Synthetic scenes of land and water: each function draws one and says what it drew."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from .drawing import GROUNDS, PAINTS, WATERS, Canvas, Point, blob, turned
from .words import DIRECTIONS, Facts, a, corner, count_of, line_through, pick, place


def farmland(rng: np.random.Generator, size_px: int) -> tuple[Image.Image, Facts]:
    crops = {"green": (92, 124, 58), "yellow": (196, 172, 88), "brown": (132, 100, 74), "dark green": (56, 88, 48)}
    first, second = rng.permutation(list(crops))[:2]
    columns, roof, count = int(rng.integers(2, 5)), pick(rng, "red", "grey", "blue"), int(rng.integers(1, 5))
    angle = math.pi / 2 * int(rng.integers(2))
    canvas = Canvas(size_px, rng, (124, 116, 78))
    for column in range(columns):
        for half in range(2):
            crop = crops[str(first if (column + half) % 2 == 0 else second)]
            at = ((column + 0.5) / columns - 0.5, half * 0.5 - 0.25)
            width = 1 / columns - 0.02
            corners = [(-width / 2, -0.24), (width / 2, -0.24), (width / 2, 0.24), (-width / 2, 0.24)]
            field = turned([(x + at[0], y + at[1]) for x, y in corners], (0.5, 0.5), angle)
            canvas.polygon(field, canvas.vary(crop, 10), rough=90)
            canvas.rows(field, angle + math.pi / 2 * int(rng.integers(2)), 0.026, int(rng.integers(25, 70)))
    pond = corner(rng)
    canvas.disc(pond, 0.13, (150, 130, 96), rough=80)
    water = pick(rng, *WATERS)
    canvas.disc(pond, 0.115, canvas.vary(WATERS[water], 6), rough=12)
    yard = (1 - pond[0], 1 - pond[1]) if rng.random() < 0.5 else (1 - pond[0], pond[1])
    canvas.box(yard, (0.34, 0.3), 0, (156, 140, 110), rough=90)
    for step in range(count):
        at = (yard[0] - 0.085 + 0.17 * (step % 2), yard[1] - 0.07 + 0.14 * (step // 2))
        canvas.house(at, (0.12, 0.085), float(rng.choice([0.0, math.pi / 2])), canvas.vary(PAINTS[roof], 8))
    return canvas.finish(), Facts(
        "farmland",
        f"{count_of(columns * 2, 'rectangular field')} in {first} and {second}",
        f"a round {water} pond {place(pond)}",
        count_of(count, f"{roof} farmhouse"),
        place(yard),
    )


def river(rng: np.random.Generator, size_px: int) -> tuple[Image.Image, Facts]:
    bank, water = pick(rng, "green grass", "dry grass", "bare soil"), pick(rng, *WATERS)
    way, angle = DIRECTIONS[int(rng.integers(4))]
    count, paint = int(rng.integers(1, 5)), pick(rng, "white", "red", "yellow")
    canvas = Canvas(size_px, rng, GROUNDS[bank], rough=190)
    phase = rng.uniform(0, 2 * math.pi)

    def bend(t: float) -> Point:
        return t, 0.07 * math.sin(5 * t + phase)

    course = turned([bend(t) for t in np.linspace(-0.9, 0.9, 30)], (0.5, 0.5), angle)
    wood = turned([(rng.uniform(-0.3, 0.3), 0.42 if rng.random() < 0.5 else -0.42)], (0.5, 0.5), angle)[0]
    canvas.wood(blob(wood, 0.2, rng))
    canvas.road(course, 0.36, (170, 156, 122))
    canvas.road(course, 0.32, canvas.vary(WATERS[water], 6))
    bridge = float(rng.choice([-0.25, 0.0, 0.25]))
    middle = turned([bend(bridge)], (0.5, 0.5), angle)[0]
    canvas.box(middle, (0.085, 1.8), angle, (112, 112, 114), height=0.02)
    canvas.box(middle, (0.012, 1.8), angle, (200, 196, 180))
    spots = [t for t in (-0.42, -0.3, -0.12, 0.12, 0.3, 0.42) if abs(t - bridge) > 0.1]
    for t in rng.permutation(spots)[:count]:
        x, y = bend(float(t))
        at = turned([(x, y + rng.uniform(-0.06, 0.06))], (0.5, 0.5), angle)[0]
        canvas.boat(at, angle + (math.pi if rng.random() < 0.5 else 0), PAINTS[paint], 0.1, wake=True)
    return canvas.finish(), Facts(
        "a river landscape",
        f"{a(water)} river running {way} through {bank}",
        f"a wood {place(wood)} and a bridge",
        count_of(count, f"{paint} boat"),
        "sailing on the river",
    )


def harbor(rng: np.random.Generator, size_px: int) -> tuple[Image.Image, Facts]:
    water, paint = pick(rng, "blue", "green"), pick(rng, "white", "red", "yellow", "grey")
    piers, count = int(rng.integers(1, 4)), int(rng.integers(2, 11))
    angle = math.pi / 2 * int(rng.integers(4))
    canvas = Canvas(size_px, rng, WATERS[water], rough=35)
    quay = turned([(-0.46, 0.0)], (0.5, 0.5), angle)[0]
    canvas.box(quay, (0.3, 1.4), angle, canvas.vary(GROUNDS["concrete"], 8), rough=70, height=0.015)
    shed = pick(rng, "red", "blue", "grey")
    hall = turned([(-0.43, float(rng.choice([-0.28, 0.28])))], (0.5, 0.5), angle)[0]
    canvas.house(hall, (0.12, 0.26), angle, canvas.vary(PAINTS[shed], 8))
    berths = []
    for y in np.linspace(-0.34, 0.34, piers) if piers > 1 else (0.0,):
        canvas.box(turned([(-0.02, y)], (0.5, 0.5), angle)[0], (0.66, 0.035), angle, (158, 146, 126), height=0.01)
        berths += [(x, y + shift) for x in (-0.2, -0.06, 0.08, 0.22) for shift in (-0.085, 0.085)]
    count = min(count, len(berths))
    for k in rng.permutation(len(berths))[:count]:
        turn = angle + math.pi / 2 * (1 if rng.random() < 0.5 else -1)
        canvas.boat(turned([berths[k]], (0.5, 0.5), angle)[0], turn, PAINTS[paint], 0.125)
    return canvas.finish(), Facts(
        "a harbor",
        f"{water} water and a concrete quay {place(quay)}",
        f"{count_of(piers, 'pier')} and {a(shed)} shed {place(hall)}",
        count_of(count, f"{paint} boat"),
        "moored at the piers",
    )


def forest(rng: np.random.Generator, size_px: int) -> tuple[Image.Image, Facts]:
    clearing, water = pick(rng, "green grass", "bare soil", "sand"), pick(rng, *WATERS)
    way, angle = DIRECTIONS[int(rng.integers(4))]
    roof, count = pick(rng, "red", "white", "yellow", "blue"), int(rng.integers(1, 5))
    lake = corner(rng)
    open_at = (1 - lake[0], 1 - lake[1]) if rng.random() < 0.6 else (1 - lake[0], lake[1])
    canvas = Canvas(size_px, rng, GROUNDS["dark forest floor"])
    canvas.wood([(0, 0), (1, 0), (1, 1), (0, 1)])
    canvas.road(line_through(angle), 0.05, canvas.vary((164, 146, 112), 8))
    canvas.polygon(blob(lake, 0.19, rng), (112, 108, 82), rough=90)
    canvas.polygon(blob(lake, 0.165, rng), canvas.vary(WATERS[water], 6), rough=10)
    canvas.polygon(blob(open_at, 0.22, rng, ragged=0.15), canvas.vary(GROUNDS[clearing], 8), rough=160)
    for step in range(count):
        at = (open_at[0] - 0.065 + 0.13 * (step % 2), open_at[1] - 0.055 + 0.11 * (step // 2))
        canvas.house(at, (0.09, 0.065), rng.uniform(-0.3, 0.3), PAINTS[roof])
    return canvas.finish(), Facts(
        "a dense forest",
        f"{a(water)} lake {place(lake)} and a track {way}",
        f"a clearing of {clearing} {place(open_at)}",
        count_of(count, f"{roof} hut"),
        "in the clearing",
    )


def beach(rng: np.random.Generator, size_px: int) -> tuple[Image.Image, Facts]:
    quarter = int(rng.integers(4))
    angle, water = quarter * math.pi / 2, pick(rng, "blue", "green")
    umbrellas, paint = int(rng.integers(2, 10)), pick(rng, "red", "blue", "yellow", "white")
    boats, hull = int(rng.integers(1, 4)), pick(rng, "white", "orange", "black")
    canvas = Canvas(size_px, rng, GROUNDS["sand"], rough=90)
    phase = rng.uniform(0, 6.28)
    for reach, colour, rough in ((0.07, (226, 218, 196), 60), (0.035, (226, 232, 230), 120), (0.0, WATERS[water], 40)):
        shore = [(reach - 0.02 + 0.03 * math.sin(7 * y + phase), y) for y in np.linspace(-1, 1, 25)]
        canvas.polygon(turned([(-1.5, -1), *shore, (-1.5, 1)], (0.5, 0.5), angle), colour, rough=rough)
    canvas.box(turned([(0.47, 0.0)], (0.5, 0.5), angle)[0], (0.2, 1.6), angle, GROUNDS["green grass"], rough=200)
    sea = turned([(-0.3, 0.0)], (0.5, 0.5), angle)[0]
    for y in np.linspace(-0.42, 0.42, 7):
        canvas.tree(
            turned([(0.42, float(y) + rng.uniform(-0.04, 0.04))], (0.5, 0.5), angle)[0], rng.uniform(0.03, 0.05)
        )
    spots = [(x, y) for x in (0.15, 0.27) for y in np.linspace(-0.4, 0.4, 5)]
    for k in rng.permutation(10)[:umbrellas]:
        at = turned([spots[k]], (0.5, 0.5), angle)[0]
        canvas.disc(at, 0.034, PAINTS[paint], height=0.03)
        canvas.disc(at, 0.012, (235, 235, 230))
    for y in rng.permutation([-0.35, -0.1, 0.15, 0.38])[:boats]:
        at = turned([(rng.uniform(-0.36, -0.2), float(y))], (0.5, 0.5), angle)[0]
        canvas.boat(at, angle + rng.uniform(1.2, 1.9), PAINTS[hull], 0.12, wake=True)
    return canvas.finish(), Facts(
        "a sandy beach",
        f"the {water} sea {place(sea)}",
        f"a row of trees and {count_of(boats, f'{hull} boat')} at sea",
        count_of(umbrellas, f"{paint} umbrella"),
        "standing on the sand",
    )
