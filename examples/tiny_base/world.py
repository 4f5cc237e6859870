"""The tiny base's renderer: six things in six places, 128x128 pixels.

What is drawn is said in looks.py. Everything is a function of (seed, index).

Shapes are polygons in the square [-1, 1]^2. Their points are rotated and
scaled; the polygons are filled at three times the size and reduced once, so that outlines are smooth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from places import background
from shapes import GROUNDED, LOGOS, OUTLINE, SHAPES, WORN, Colour, Points, Shape

PIXELS = 128
SUPER = 3


@dataclass(frozen=True)
class Look:
    """The look of a thing: body and trim colours, pattern, second tone, logo, and what it wears."""

    kind: str
    body: Colour
    pattern: str = "plain"
    mark: Colour | None = None  # colour of stripes or dots; None: a lighter or darker tone of the body's colour
    second: Colour | None = None  # lower half of a two-tone body
    logo: str | None = None  # a key of LOGOS
    logo_colour: Colour = (255, 255, 255)
    worn: str | None = None  # a key of WORN


@dataclass(frozen=True)
class Scene:
    """One image: a look in a place, with everything that varies between two photos of it."""

    look: Look
    place: str
    size: float = 0.62  # share of the image's width
    centre: tuple[float, float] = (0.5, 0.56)
    angle: float = 0.0  # degrees
    aspect: float = 1.0
    flip: bool = False
    light: float = 1.0
    stripe_angle: float = 0.0
    seed: int = 0


def _pattern(shape: Shape, scene: Scene, side: int, to_unit: np.ndarray) -> np.ndarray:
    """The body's colours [side, side, 3]: two tones, then stripes or dots in the body's own coordinates."""
    look = scene.look
    ys, xs = np.mgrid[0:side, 0:side].astype(np.float32)
    u = to_unit[0, 0] * xs + to_unit[0, 1] * ys + to_unit[0, 2]
    v = to_unit[1, 0] * xs + to_unit[1, 1] * ys + to_unit[1, 2]
    paint = np.empty((side, side, 3), np.uint8)
    paint[:] = look.body
    if look.second is not None:
        paint[v > shape.split_at] = look.second
    mark = mark_of(look)
    if look.pattern == "striped":
        a = math.radians(scene.stripe_angle)
        phase = (u * math.sin(a) + v * math.cos(a)) / 0.4
        paint[(phase - np.floor(phase)) < 0.46] = mark
    elif look.pattern == "dotted":
        pitch = 0.42
        row = np.floor(v / pitch)
        du = (u / pitch + 0.5 * (row % 2)) % 1 - 0.5
        dv = (v / pitch) % 1 - 0.5
        paint[(du**2 + dv**2) < 0.3**2] = mark
    return paint


def mark_of(look: Look) -> Colour:
    """The colour of stripes or dots: its own, or one that can be seen on the body."""
    if look.mark is not None:
        return look.mark
    body = look.body
    luma = 0.3 * body[0] + 0.59 * body[1] + 0.11 * body[2]
    return (255, 250, 240) if luma < 220 else (105, 105, 118)


def render(scene: Scene, pixels: int = PIXELS) -> Image.Image:
    """A scene as an RGB image with sides of `pixels` pixels."""
    side = pixels * SUPER
    rng = np.random.default_rng(scene.seed)
    image = background(scene.place, side, rng)
    shape = SHAPES[scene.look.kind]()
    forward, half = _to_image(scene, side), scene.size * side / 2
    _shadow(image, scene, half)
    _paint(image, shape, scene, forward)
    small = image.resize((pixels, pixels), Image.Resampling.BOX)
    if scene.light != 1.0:
        small = Image.fromarray(np.clip(np.asarray(small) * scene.light, 0, 255).astype(np.uint8))
    return small


def _to_image(scene: Scene, side: int) -> np.ndarray:
    """[3, 3]: from a shape's unit square to the pixels of an image."""
    turn = math.radians(scene.angle)
    sx, sy = scene.size * side / 2 * (-1 if scene.flip else 1), scene.size * side / 2 * scene.aspect
    return np.array(
        [
            [sx * math.cos(turn), -sy * math.sin(turn), scene.centre[0] * side],
            [sx * math.sin(turn), sy * math.cos(turn), scene.centre[1] * side],
            [0, 0, 1],
        ]
    )


def logo_place(scene: Scene) -> tuple[float, float, float]:
    """Where the thing's logo is, or would be: x, y and radius, from -1 to 1 over the image."""
    x, y, r = SHAPES[scene.look.kind]().logo_at
    across, down, _ = _to_image(scene, 2) @ (x, y, 1)
    return float(across) - 1, float(down) - 1, r * scene.size


def _shadow(image: Image.Image, scene: Scene, half: float) -> None:
    if scene.look.kind not in GROUNDED:
        return
    side = image.width
    x, y = scene.centre[0] * side, scene.centre[1] * side + half * (0.72 if scene.look.kind == "car" else 0.86)
    layer = Image.new("L", image.size, 0)
    ImageDraw.Draw(layer).ellipse((x - half * 0.95, y - half * 0.14, x + half * 0.95, y + half * 0.16), fill=70)
    image.paste(Image.new("RGB", image.size, (20, 20, 30)), (0, 0), layer)


def _paint(image: Image.Image, shape: Shape, scene: Scene, forward: np.ndarray) -> None:
    draw, look, width = ImageDraw.Draw(image), scene.look, max(2, round(image.width * 0.014))

    def place(points: Sequence[tuple[float, float]]) -> Points:
        return [tuple(forward[:2] @ (x, y, 1)) for x, y in points]

    def outline(points: Points) -> None:
        draw.line([*points, points[0], points[1]], fill=OUTLINE, width=width, joint="curve")

    for points, colour in shape.behind:
        polygon = place(points)
        draw.polygon(polygon, fill=colour or look.body)
        outline(polygon)
    mask = Image.new("L", image.size, 0)
    for points in shape.body:
        ImageDraw.Draw(mask).polygon(place(points), fill=255)
    paint = _pattern(shape, scene, image.width, np.linalg.inv(forward))
    image.paste(Image.fromarray(paint), (0, 0), mask)
    for points in shape.body:
        outline(place(points))
    for points, colour in shape.over:
        polygon = place(points)
        draw.polygon(polygon, fill=colour)
        outline(polygon)
    for points in shape.lines:
        draw.line(place(points), fill=OUTLINE, width=width, joint="curve")
    if look.logo is not None:
        x, y, r = shape.logo_at
        polygon = place([(x + r * px, y + r * py) for px, py in LOGOS[look.logo]])
        draw.polygon(polygon, fill=look.logo_colour)
        outline(polygon)
    if look.worn is not None:
        x, y, r = shape.top_at
        for points, colour in WORN[look.worn]:
            polygon = place([(x + r * px, y + r * py) for px, py in points])
            draw.polygon(polygon, fill=colour)
            outline(polygon)


def pose(look: Look, place: str, rng: np.random.Generator) -> Scene:
    """A random photo of a look in a place: size, position, rotation, shape, light."""
    size = rng.uniform(0.5, 0.68) if look.worn else rng.uniform(0.56, 0.8)
    slack = (1 - size) / 2
    x = 0.5 + rng.uniform(-1, 1) * slack * 0.9
    y = 0.57 + rng.uniform(-1, 1) * slack * 0.5 if look.kind in GROUNDED else 0.5 + rng.uniform(-1, 1) * slack * 0.9
    top = size * 0.86 if look.worn else size * 0.46
    return Scene(
        look,
        place,
        size=size,
        centre=(x, min(max(y, top), 1 - size * 0.46)),
        angle=rng.uniform(-14, 14) if look.kind != "house" else rng.uniform(-5, 5),
        aspect=rng.uniform(0.9, 1.1),
        flip=bool(rng.random() < 0.5),
        light=rng.uniform(0.92, 1.06),
        stripe_angle=float(rng.choice([0, 90, 0, 90]) + rng.uniform(-8, 8)),
        seed=int(rng.integers(2**31)),
    )
