"""Synthetic scenes of what people built: each function draws one and says what it drew."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from .drawing import GROUNDS, PAINTS, Canvas, Point, turned
from .words import DIRECTIONS, NUMBERS, Facts, a, count_of, line_through, pick, place


def airport(rng: np.random.Generator, size_px: int) -> tuple[Image.Image, Facts]:
    ground = pick(rng, "green grass", "dry grass", "bare soil")
    way, angle = DIRECTIONS[int(rng.integers(4))]
    count, paint = int(rng.integers(1, 6)), pick(rng, "white", "red", "blue", "yellow")
    roof = pick(rng, "grey", "white", "brown")
    side = 1 if rng.random() < 0.5 else -1
    canvas = Canvas(size_px, rng, GROUNDS[ground])
    runway = turned([(0.0, -side * 0.22)], (0.5, 0.5), angle)[0]
    apron = turned([(0.0, side * 0.2)], (0.5, 0.5), angle)[0]
    hall = turned([(0.0, side * 0.36)], (0.5, 0.5), angle)[0]
    canvas.box(apron, (0.92, 0.30), angle, canvas.vary(GROUNDS["concrete"], 8), rough=45)
    canvas.road(line_through(angle, at=runway), 0.15, canvas.vary((86, 87, 92), 8), line=(226, 226, 222))
    canvas.box(hall, (0.5, 0.1), angle, canvas.vary(PAINTS[roof], 8), height=0.035)
    for spot in np.linspace(-0.38, 0.38, 5)[rng.permutation(5)[:count]]:
        at = turned([(float(spot), side * 0.2)], (0.5, 0.5), angle)[0]
        canvas.aircraft(at, 0.19, angle - side * math.pi / 2, PAINTS[paint])
    return canvas.finish(), Facts(
        "an airport",
        f"a runway {way} on {ground}",
        f"a {roof} terminal building {place(hall)}",
        f"{NUMBERS[count]} {paint} aircraft",
        "parked between the runway and the terminal",
    )


def residential(rng: np.random.Generator, size_px: int) -> tuple[Image.Image, Facts]:
    roof, paint = pick(rng, "red", "grey", "brown", "white"), pick(rng, "white", "red", "blue", "black")
    way, angle = DIRECTIONS[2 * int(rng.integers(2))]
    houses, cars, pools = int(rng.integers(4, 9)), int(rng.integers(1, 5)), int(rng.integers(0, 4))
    canvas = Canvas(size_px, rng, GROUNDS["green grass"], rough=140)
    canvas.road(line_through(angle), 0.13, canvas.vary((116, 116, 118), 8), line=(214, 212, 200))
    plots = [(x, y) for x in (-0.375, -0.125, 0.125, 0.375) for y in (-0.24, 0.24)]
    chosen = [plots[k] for k in sorted(rng.permutation(8)[:houses])]
    for number, (x, y) in enumerate(chosen):
        outward = math.copysign(0.17, y)
        canvas.box(turned([(x, y * 0.5)], (0.5, 0.5), angle)[0], (0.035, 0.18), angle, (170, 166, 158))
        at = turned([(x, y)], (0.5, 0.5), angle)[0]
        canvas.house(at, (0.16, 0.12), angle, canvas.vary(PAINTS[roof], 12))
        garden = turned([(x, y + outward)], (0.5, 0.5), angle)[0]
        if number < pools:
            canvas.box(garden, (0.1, 0.065), angle, (210, 206, 196))
            canvas.box(garden, (0.08, 0.045), angle, (64, 168, 196), rough=5)
    for x, y in plots:
        tree = turned([(x + 0.115, y + math.copysign(rng.uniform(0.02, 0.2), y))], (0.5, 0.5), angle)[0]
        canvas.tree(tree, rng.uniform(0.03, 0.045))
    for x in rng.permutation(np.linspace(-0.42, 0.42, 6))[:cars]:
        lane = 0.032 if rng.random() < 0.5 else -0.032
        canvas.car(turned([(float(x), lane)], (0.5, 0.5), angle)[0], angle, PAINTS[paint], 0.062)
    swimming = f" and {count_of(pools, 'swimming pool')}" if pools else ""
    return canvas.finish(), Facts(
        "a residential area",
        f"a street {way} between green gardens",
        f"{count_of(houses, 'house')} with {roof} roofs{swimming}",
        count_of(cars, f"{paint} car"),
        "on the street",
    )


def storage_tanks(rng: np.random.Generator, size_px: int) -> tuple[Image.Image, Facts]:
    ground, paint = pick(rng, "bare soil", "gravel", "dry grass"), pick(rng, "white", "grey", "brown", "green")
    count, trucks, lorry = int(rng.integers(1, 8)), int(rng.integers(1, 4)), pick(rng, "red", "blue", "yellow")
    edge, angle = (1 if rng.random() < 0.5 else -1), math.pi / 2 * int(rng.integers(2))
    canvas = Canvas(size_px, rng, GROUNDS[ground])
    road = turned([(0.0, edge * 0.4)], (0.5, 0.5), angle)[0]
    canvas.road(line_through(angle, at=road), 0.12, canvas.vary(GROUNDS["asphalt"], 8), line=(214, 212, 200))
    spots = [(x, y) for y in (-0.3, 0.02) for x in (-0.36, -0.12, 0.12, 0.36)]
    order = rng.permutation(8)
    for k in sorted(order[:count]):
        at = turned([(spots[k][0], edge * spots[k][1])], (0.5, 0.5), angle)[0]
        canvas.disc(at, 0.118, canvas.vary((122, 112, 98), 6), rough=110)
        canvas.tank(at, 0.093 if count > 3 else 0.1, canvas.vary(PAINTS[paint], 6))
    hut = turned([(spots[order[7]][0], edge * spots[order[7]][1])], (0.5, 0.5), angle)[0]
    canvas.block(hut, (0.15, 0.11), angle, canvas.vary((188, 184, 176), 8))
    for x in rng.permutation([-0.36, -0.12, 0.12, 0.36])[:trucks]:
        at = turned([(float(x), edge * 0.4 + rng.choice([-0.028, 0.028]))], (0.5, 0.5), angle)[0]
        canvas.car(at, angle, PAINTS[lorry], 0.09)
    return canvas.finish(), Facts(
        "a tank farm",
        f"{count_of(count, f'round {paint} storage tank')} on {ground}",
        f"a road {place(road)} and a building {place(hut)}",
        count_of(trucks, f"{lorry} truck"),
        "driving on the road",
    )


def parking(rng: np.random.Generator, size_px: int) -> tuple[Image.Image, Facts]:
    rows, paint = int(rng.integers(2, 5)), pick(rng, "white", "red", "blue", "black", "yellow")
    roof, shop_left = pick(rng, "white", "grey", "brown", "blue"), rng.random() < 0.5
    count, (way, angle) = int(rng.integers(3, 13)), DIRECTIONS[2 * int(rng.integers(2))]
    canvas = Canvas(size_px, rng, GROUNDS["asphalt"], rough=60)
    shop = turned([(-0.37 if shop_left else 0.37, 0.0)], (0.5, 0.5), angle)[0]
    start = -0.2 if shop_left else -0.46
    places = []
    for y in np.linspace(-0.4, 0.4, rows) if rows > 2 else (-0.22, 0.22):
        for x in np.linspace(start, start + 0.66, 10):
            spot = turned([(x - 0.033, float(y))], (0.5, 0.5), angle)[0]
            canvas.box(spot, (0.006, 0.14), angle, (206, 206, 200))
            places.append((x, float(y)))
    for k in rng.permutation(len(places))[:count]:
        at = turned([places[k]], (0.5, 0.5), angle)[0]
        canvas.car(at, angle + math.pi / 2, PAINTS[paint], 0.1)
    canvas.block(shop, (0.2, 0.8), angle, canvas.vary(PAINTS[roof], 8))
    return canvas.finish(), Facts(
        "a parking lot",
        f"{count_of(rows, 'marked row')} of bays {way} on asphalt",
        f"a long {roof} flat roof {place(shop)}",
        count_of(count, f"{paint} car"),
        "parked in the bays",
    )


def intersection(rng: np.random.Generator, size_px: int) -> tuple[Image.Image, Facts]:
    ground, roof = pick(rng, "green grass", "dry grass", "concrete"), pick(rng, "red", "grey", "white", "brown")
    cars, paint = int(rng.integers(1, 8)), pick(rng, "white", "red", "blue", "yellow", "black")
    slanted = rng.random() < 0.5
    angle, block = (math.pi / 4 if slanted else 0.0), int(rng.integers(1, 4))
    canvas = Canvas(size_px, rng, GROUNDS[ground])
    grey = canvas.vary((108, 108, 112), 8)
    for turn in (0.0, math.pi / 2):
        canvas.road(line_through(angle + turn), 0.2, grey, line=(230, 228, 214))
    canvas.box((0.5, 0.5), (0.2, 0.2), angle, grey, rough=45)
    corners = [turned([(x, y)], (0.5, 0.5), angle)[0] for x, y in ((-0.3, -0.3), (0.3, -0.3), (0.3, 0.3), (-0.3, 0.3))]
    order = rng.permutation(4)
    for k in order[:block]:
        canvas.block(corners[k], (0.24, 0.24), angle, canvas.vary(PAINTS[roof], 8))
    for k in order[block:]:
        for x, y in rng.uniform(-0.09, 0.09, (4, 2)):
            canvas.tree((corners[k][0] + x, corners[k][1] + y), 0.05)
    lanes = [(t, 0.05 * s, 0.0) for t in (-0.42, -0.26, 0.26, 0.42) for s in (1, -1)]
    lanes += [(0.05 * s, t, math.pi / 2) for t in (-0.42, -0.26, 0.26, 0.42) for s in (1, -1)]
    for k in rng.permutation(len(lanes))[:cars]:
        x, y, turn = lanes[k]
        canvas.car(turned([(x, y)], (0.5, 0.5), angle)[0], angle + turn, PAINTS[paint], 0.085)
    shape = "diagonal" if slanted else "straight"
    return canvas.finish(), Facts(
        "an intersection",
        f"two {shape} roads crossing on {ground}",
        count_of(block, f"flat {roof} building")
        + (f" {place(corners[order[0]])}" if block == 1 else " at its corners"),
        count_of(cars, f"{paint} car"),
        "driving on the roads",
    )


def sports_ground(rng: np.random.Generator, size_px: int) -> tuple[Image.Image, Facts]:
    turf = pick(rng, "green", "brown")
    upright, courts = rng.random() < 0.5, int(rng.integers(1, 4))
    colour, track = pick(rng, "blue", "red", "green"), pick(rng, "red", "grey", "blue")
    angle, side = (math.pi / 2 if upright else 0.0), (1 if rng.random() < 0.5 else -1)
    canvas = Canvas(size_px, rng, GROUNDS["dry grass" if turf == "green" else "green grass"])
    at = turned([(0.0, -side * 0.17)], (0.5, 0.5), angle)[0]
    lane = canvas.vary({"red": (164, 84, 62), "grey": (134, 132, 130), "blue": (72, 104, 150)}[track], 6)
    canvas.polygon(turned(_oval(0.88, 0.56), at, angle), lane, rough=30)
    grass = {"green": (78, 122, 58), "brown": (150, 118, 78)}[turf]
    canvas.polygon(turned(_oval(0.74, 0.42), at, angle), canvas.vary(grass, 8), rough=70)
    for width, height in ((0.52, 0.34), (0.506, 0.326)):
        canvas.box(at, (width, height), angle, (226, 228, 220) if height == 0.34 else grass, rough=60)
    canvas.box(at, (0.01, 0.34), angle, (226, 228, 220))
    for x in np.linspace(-0.3, 0.3, 3)[:courts] if side > 0 else np.linspace(0.3, -0.3, 3)[:courts]:
        spot = turned([(float(x), side * 0.32)], (0.5, 0.5), angle)[0]
        canvas.box(spot, (0.24, 0.18), angle, (196, 192, 182))
        canvas.box(spot, (0.2, 0.12), angle, canvas.vary(PAINTS[colour], 6))
        canvas.box(spot, (0.008, 0.15), angle, (236, 236, 232))
    court = turned([(0.0, side * 0.32)], (0.5, 0.5), angle)[0]
    return canvas.finish(), Facts(
        "a sports ground",
        f"{a(turf)} football pitch {place(at)}",
        f"a {track} running track around it",
        count_of(courts, f"{colour} tennis court"),
        f"{place(court)} beside the track",
    )


def _oval(width: float, height: float) -> list[Point]:
    radius, straight = height / 2, (width - height) / 2
    turns = np.linspace(-math.pi / 2, math.pi / 2, 12)
    right = [(straight + radius * math.cos(t), radius * math.sin(t)) for t in turns]
    return right + [(-x, -y) for x, y in right]
