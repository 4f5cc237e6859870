"""The things of the tiny world, the logos on them and what they wear, as polygons in the unit square [-1, 1]^2.

world.py rotates, scales and paints them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

Colour = tuple[int, int, int]
Points = list[tuple[float, float]]

CLASSES = ("mug", "ball", "house", "car", "fish", "backpack")
OUTLINE: Colour = (35, 30, 35)


@dataclass
class Shape:
    """A thing's polygons in unit coordinates: the patterned body, and details drawn behind or over it."""

    body: list[Points]
    behind: list[tuple[Points, Colour | None]] = field(default_factory=list)  # None: the body's colour
    over: list[tuple[Points, Colour]] = field(default_factory=list)
    lines: list[Points] = field(default_factory=list)
    split_at: float = 0.08  # where the lower tone of two begins
    logo_at: tuple[float, float, float] = (0.0, 0.1, 0.3)  # x, y, radius
    top_at: tuple[float, float, float] = (0.0, -0.8, 0.45)  # where it wears something: x, y, half of its width


def ellipse(x: float, y: float, rx: float, ry: float, start: float = 0, stop: float = 360, n: int = 40) -> Points:
    turns = [math.radians(start + (stop - start) * k / n) for k in range(n + (stop - start < 360))]
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in turns]


def box(left: float, top: float, right: float, bottom: float, r: float = 0.0) -> Points:
    if r == 0:
        return [(left, top), (right, top), (right, bottom), (left, bottom)]
    corners = (
        (right - r, top + r, -90),
        (right - r, bottom - r, 0),
        (left + r, bottom - r, 90),
        (left + r, top + r, 180),
    )
    return [point for x, y, a in corners for point in ellipse(x, y, r, r, a, a + 90, 6)]


def mug() -> Shape:
    body = [(-0.72, -0.62), (0.42, -0.62), (0.38, 0.72), (0.25, 0.82), (-0.55, 0.82), (-0.68, 0.72)]
    outer, inner = ellipse(0.42, 0.05, 0.52, 0.46, -90, 90), ellipse(0.42, 0.05, 0.27, 0.23, -90, 90)
    handle = [*outer, *reversed(inner)]
    rim = ellipse(-0.15, -0.62, 0.57, 0.15)
    return Shape(
        [body],
        behind=[(handle, None)],
        over=[(rim, (70, 50, 45))],
        logo_at=(-0.15, 0.16, 0.33),
        top_at=(-0.15, -0.66, 0.5),
    )


def ball() -> Shape:
    logo, top = (0, 0, 0.4), (0, -0.8, 0.5)
    return Shape([ellipse(0, 0, 0.88, 0.88, n=60)], logo_at=logo, top_at=top)


def house() -> Shape:
    wall = box(-0.75, -0.1, 0.75, 0.85)
    roof = [(-0.98, -0.1), (0, -0.92), (0.98, -0.1)]
    chimney = box(0.42, -0.85, 0.64, -0.3)
    door = box(-0.16, 0.3, 0.2, 0.85)
    windows = [(box(-0.6, 0.12, -0.28, 0.45), (190, 225, 245)), (box(0.32, 0.12, 0.62, 0.45), (190, 225, 245))]
    over = [(roof, (110, 55, 50)), (door, (90, 60, 40)), *windows]
    return Shape(
        [wall],
        behind=[(chimney, (120, 80, 75))],
        over=over,
        split_at=0.36,
        logo_at=(0, -0.42, 0.24),
        top_at=(0, -0.82, 0.42),
    )


def car() -> Shape:
    body = [(-0.98, 0.1), (-0.9, -0.05), (-0.55, -0.1), (-0.32, -0.5), (0.38, -0.5), (0.62, -0.1), (0.92, -0.02)]
    body += [(0.98, 0.12), (0.98, 0.42), (-0.98, 0.42)]
    glass = [([(-0.4, -0.12), (-0.23, -0.4), (0.0, -0.4), (0.0, -0.12)], (195, 228, 245))]
    glass += [([(0.09, -0.12), (0.09, -0.4), (0.31, -0.4), (0.46, -0.12)], (195, 228, 245))]
    wheels = [(ellipse(x, 0.43, 0.25, 0.25), (45, 45, 50)) for x in (-0.55, 0.55)]
    hubs = [(ellipse(x, 0.43, 0.11, 0.11), (205, 205, 210)) for x in (-0.55, 0.55)]
    logo, top = (0.0, 0.14, 0.24), (0.03, -0.48, 0.42)
    return Shape([body], over=[*glass, *wheels, *hubs], logo_at=logo, top_at=top)


def fish() -> Shape:
    body = ellipse(-0.18, 0, 0.72, 0.5, n=50)
    tail = [(0.4, 0), (0.95, -0.48), (0.84, 0), (0.95, 0.48)]
    fin = [(-0.35, -0.42), (0.02, -0.8), (0.25, -0.36)]
    eye = [(ellipse(-0.6, -0.12, 0.13, 0.13), (255, 255, 255)), (ellipse(-0.62, -0.12, 0.06, 0.06), OUTLINE)]
    return Shape(
        [body], behind=[(tail, None), (fin, None)], over=eye, logo_at=(0.0, 0.04, 0.28), top_at=(-0.42, -0.42, 0.36)
    )


def backpack() -> Shape:
    body = box(-0.62, -0.68, 0.62, 0.85, 0.32)
    handle = [*ellipse(0, -0.68, 0.27, 0.27, 180, 360), *reversed(ellipse(0, -0.68, 0.13, 0.13, 180, 360))]
    straps = [(box(-0.84, -0.28, -0.6, 0.6, 0.1), (75, 65, 65)), (box(0.6, -0.28, 0.84, 0.6, 0.1), (75, 65, 65))]
    pocket = box(-0.42, 0.28, 0.42, 0.72, 0.12)
    flap = [(-0.6, -0.2), (0.6, -0.2)]
    behind: list[tuple[Points, Colour | None]] = [(handle, (75, 65, 65)), *straps]
    return Shape(
        [body], behind=behind, lines=[[*pocket, pocket[0]], flap], logo_at=(0, 0.02, 0.26), top_at=(0, -0.74, 0.45)
    )


SHAPES: dict[str, Callable[[], Shape]] = {
    "mug": mug, "ball": ball, "house": house, "car": car, "fish": fish, "backpack": backpack,
}  # fmt: skip
GROUNDED = {"mug", "house", "car", "backpack"}


def star(points: int = 5, inner: float = 0.45) -> Points:
    turns = [(math.pi * k / points - math.pi / 2, 1.0 if k % 2 == 0 else inner) for k in range(2 * points)]
    return [(r * math.cos(a), r * math.sin(a)) for a, r in turns]


def moon(n: int = 24) -> Points:
    """A crescent: the left of a disc without a disc that is further right."""
    outer, inner = ellipse(0.1, 0, 0.9, 0.9, 60, 300, n), ellipse(0.45, 0, 0.78, 0.78, 88, 272, n)
    return [*outer, *reversed(inner)]


LOGOS: dict[str, Points] = {
    "star": star(),
    "square": box(-0.75, -0.75, 0.75, 0.75),
    "circle": ellipse(0, 0, 0.85, 0.85),
    "heart": [
        (0, 0.9),
        (-0.9, -0.05),
        (-0.85, -0.55),
        (-0.45, -0.8),
        (0, -0.4),
        (0.45, -0.8),
        (0.85, -0.55),
        (0.9, -0.05),
    ],
    "moon": moon(),
}

# what a thing wears: polygons with the point that it stands on at (0, 0), one unit being half of its width
WORN: dict[str, list[tuple[Points, Colour]]] = {
    "hat": [(box(-0.6, -1.0, 0.6, 0.0), (45, 42, 55)), (box(-0.6, -0.35, 0.6, -0.1), (205, 45, 50)),
            (box(-1.0, -0.1, 1.0, 0.12), (45, 42, 55))],
    "crown": [([(-0.8, 0.1), (-0.95, -0.85), (-0.45, -0.4), (0, -1.0), (0.45, -0.4), (0.95, -0.85), (0.8, 0.1)],
               (250, 205, 60))],
    "flag": [(box(-0.09, -1.5, 0.09, 0.1), (95, 70, 50)), ([(0.09, -1.5), (1.0, -1.15), (0.09, -0.8)], (40, 150, 90))],
}  # fmt: skip
