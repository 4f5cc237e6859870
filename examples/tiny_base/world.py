"""The tiny base's world: rendered and captioned 64x64 images of six things in six places.

    python examples/tiny_base/world.py --sheet sheet.png      # a contact sheet to look at

Everything is a function of (seed, index). Shapes are polygons in the square [-1, 1]^2. Their points are rotated and
scaled; the polygons are filled at four times the size and reduced once, so that outlines are smooth.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from places import PLACES, background
from shapes import CLASSES, GROUNDED, LOGOS, OUTLINE, SHAPES, Colour, Points, Shape

COLOURS: dict[str, Colour] = {
    "red": (214, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 215, 50),
    "green": (50, 160, 70),
    "blue": (45, 95, 210),
    "purple": (135, 60, 175),
    "pink": (245, 140, 185),
    "brown": (125, 80, 45),
}
PATTERNS = ("plain", "striped", "dotted")
SUPER = 4


@dataclass(frozen=True)
class Look:
    """The look of a thing: body and trim colours, pattern, and for subjects a second tone and a logo."""

    kind: str
    body: Colour
    pattern: str = "plain"
    mark: Colour | None = None  # colour of stripes or dots; None: a lighter or darker tone of the body's colour
    second: Colour | None = None  # lower half of a two-tone body
    logo: str | None = None  # "star", "square", "ring", "heart"
    logo_colour: Colour = (255, 255, 255)


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


def _pattern(look: Look, scene: Scene, side: int, to_unit: np.ndarray) -> np.ndarray:
    """The body's colours [side, side, 3]: two tones, then stripes or dots in the body's own coordinates."""
    ys, xs = np.mgrid[0:side, 0:side].astype(np.float32)
    u = to_unit[0, 0] * xs + to_unit[0, 1] * ys + to_unit[0, 2]
    v = to_unit[1, 0] * xs + to_unit[1, 1] * ys + to_unit[1, 2]
    paint = np.empty((side, side, 3), np.uint8)
    paint[:] = look.body
    if look.second is not None:
        paint[v > 0.08] = look.second
    mark = look.mark or _mark(look.body)
    if look.pattern == "striped":
        a = math.radians(scene.stripe_angle)
        phase = (u * math.sin(a) + v * math.cos(a)) / 0.46
        paint[(phase - np.floor(phase)) < 0.46] = mark
    elif look.pattern == "dotted":
        pitch = 0.5
        row = np.floor(v / pitch)
        du = (u / pitch + 0.5 * (row % 2)) % 1 - 0.5
        dv = (v / pitch) % 1 - 0.5
        paint[(du**2 + dv**2) < 0.3**2] = mark
    return paint


def _mark(body: Colour) -> Colour:
    luma = 0.3 * body[0] + 0.59 * body[1] + 0.11 * body[2]
    return (255, 250, 240) if luma < 190 else (255, 255, 255)


def render(scene: Scene, pixels: int = 64) -> Image.Image:
    """A scene as an RGB image with sides of `pixels` pixels."""
    side = pixels * SUPER
    rng = np.random.default_rng(scene.seed)
    image = background(scene.place, side, rng)
    shape = SHAPES[scene.look.kind]()
    half = scene.size * side / 2
    turn = math.radians(scene.angle)
    sx, sy = half * (-1 if scene.flip else 1), half * scene.aspect
    forward = np.array(
        [
            [sx * math.cos(turn), -sy * math.sin(turn), scene.centre[0] * side],
            [sx * math.sin(turn), sy * math.cos(turn), scene.centre[1] * side],
            [0, 0, 1],
        ]
    )
    _shadow(image, scene, half)
    _paint(image, shape, scene, forward)
    small = image.resize((pixels, pixels), Image.Resampling.BOX)
    if scene.light != 1.0:
        small = Image.fromarray(np.clip(np.asarray(small) * scene.light, 0, 255).astype(np.uint8))
    return small


def _shadow(image: Image.Image, scene: Scene, half: float) -> None:
    if scene.look.kind not in GROUNDED:
        return
    side = image.width
    x, y = scene.centre[0] * side, scene.centre[1] * side + half * (0.72 if scene.look.kind == "car" else 0.86)
    layer = Image.new("L", image.size, 0)
    ImageDraw.Draw(layer).ellipse((x - half * 0.95, y - half * 0.14, x + half * 0.95, y + half * 0.16), fill=70)
    image.paste(Image.new("RGB", image.size, (20, 20, 30)), (0, 0), layer)


def _paint(image: Image.Image, shape: Shape, scene: Scene, forward: np.ndarray) -> None:
    draw, look, width = ImageDraw.Draw(image), scene.look, max(2, round(image.width * 0.02))

    def place(points: Sequence[tuple[float, float]]) -> Points:
        return [tuple(forward[:2] @ (x, y, 1)) for x, y in points]  # type: ignore[misc]

    def outline(points: Points) -> None:
        draw.line([*points, points[0], points[1]], fill=OUTLINE, width=width, joint="curve")

    for points, colour in shape.behind:
        polygon = place(points)
        draw.polygon(polygon, fill=colour or look.body)
        outline(polygon)
    mask = Image.new("L", image.size, 0)
    for points in shape.body:
        ImageDraw.Draw(mask).polygon(place(points), fill=255)
    paint = _pattern(look, scene, image.width, np.linalg.inv(forward))
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


def pose(look: Look, place: str, rng: np.random.Generator) -> Scene:
    """A random photo of a look in a place: size, position, rotation, shape, light."""
    size = rng.uniform(0.6, 0.84)
    slack = (1 - size) / 2
    x = 0.5 + rng.uniform(-1, 1) * slack * 0.9
    y = 0.57 + rng.uniform(-1, 1) * slack * 0.5 if look.kind in GROUNDED else 0.5 + rng.uniform(-1, 1) * slack * 0.9
    return Scene(
        look,
        place,
        size=size,
        centre=(x, min(y, 1 - size * 0.46)),
        angle=rng.uniform(-14, 14) if look.kind != "house" else rng.uniform(-5, 5),
        aspect=rng.uniform(0.9, 1.1),
        flip=bool(rng.random() < 0.5),
        light=rng.uniform(0.92, 1.06),
        stripe_angle=float(rng.choice([0, 90, 0, 90]) + rng.uniform(-8, 8)),
        seed=int(rng.integers(2**31)),
    )


@dataclass(frozen=True)
class Facts:
    """What an image shows, in words."""

    kind: str
    colour: str
    pattern: str
    place: str


def held_out(facts: Facts) -> bool:
    """Whether a combination is held out from training. One in six is, chosen by arithmetic that covers all words
    evenly."""
    code = CLASSES.index(facts.kind) + 2 * list(COLOURS).index(facts.colour)
    return (code + PATTERNS.index(facts.pattern) + 3 * PLACES.index(facts.place)) % 6 == 0


def random_facts(rng: np.random.Generator) -> Facts:
    pick = [rng.choice(words) for words in (CLASSES, list(COLOURS), PATTERNS, PLACES)]
    return Facts(*(str(word) for word in pick))


def training_facts(rng: np.random.Generator) -> Facts:
    while held_out(facts := random_facts(rng)):
        pass
    return facts


def look_of(facts: Facts, rng: np.random.Generator) -> Look:
    jitter = np.clip(np.array(COLOURS[facts.colour]) + rng.integers(-12, 13, 3), 0, 255)
    return Look(facts.kind, tuple(int(c) for c in jitter), facts.pattern)  # type: ignore[arg-type]


def world_picture(seed: int, index: int, pixels: int = 64) -> tuple[Image.Image, Facts]:
    rng = np.random.default_rng((seed, index))
    facts = training_facts(rng)
    return render(pose(look_of(facts, rng), facts.place, rng), pixels), facts


def wild_look(rng: np.random.Generator, kind: str | None = None) -> Look:
    """A look with random colours, tones, pattern and logo, from which the VAE learns to draw subjects."""
    colours = [tuple(int(c) for c in rng.integers(0, 256, 3)) for _ in range(4)]
    body, second, mark, logo = colours
    return Look(
        kind or str(rng.choice(CLASSES)),
        body,
        str(rng.choice(PATTERNS)),
        mark,
        second if rng.random() < 0.5 else None,
        str(rng.choice(list(LOGOS))) if rng.random() < 0.5 else None,
        logo,
    )


def wild_picture(seed: int, index: int, pixels: int = 64) -> Image.Image:
    rng = np.random.default_rng((seed, index, 1))
    return render(pose(wild_look(rng), str(rng.choice(PLACES)), rng), pixels)


SUBJECTS: dict[str, Look] = {
    "mug": Look("mug", (20, 150, 150), second=(250, 165, 60), logo="star", logo_colour=(255, 250, 235)),
    "backpack": Look("backpack", (60, 65, 90), second=(150, 205, 60), logo="ring", logo_colour=(250, 90, 120)),
    "car": Look("car", (240, 235, 225), second=(20, 140, 160), logo="square", logo_colour=(205, 40, 60)),
}


def subject_picture(name: str, index: int, place: str | None = None, pixels: int = 64) -> Image.Image:
    """A photo of one of the subjects, which are never in the base's training data."""
    rng = np.random.default_rng((77, list(SUBJECTS).index(name), index))
    where = place or PLACES[index % len(PLACES)]
    return render(pose(SUBJECTS[name], where, rng), pixels)


def sheet(columns: int = 10, rows: int = 8, pixels: int = 64, zoom: int = 2) -> Image.Image:
    step = pixels * zoom
    page = Image.new("RGB", (columns * step, rows * step))
    for k in range(columns * rows):
        row = k // columns
        if row >= rows - 1:
            picture = subject_picture(list(SUBJECTS)[k % 3], k, pixels=pixels)
        elif row >= rows - 3:
            picture = wild_picture(0, k, pixels)
        else:
            picture = world_picture(0, k, pixels)[0]
        page.paste(picture.resize((step, step), Image.Resampling.BICUBIC), ((k % columns) * step, row * step))
    return page


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sheet", default="sheet.png")
    sheet().save(parser.parse_args().sheet)
