"""The six places of the tiny world: uncluttered backgrounds with a horizon, whose colours vary a little.

world.py imports this file. All randomness comes from the generator argument.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw
from shapes import Colour

PLACES = ("beach", "grass", "snow", "night", "city", "table")


class Canvas:
    """A square image to paint on; positions are fractions of its side."""

    def __init__(self, side: int, rng: np.random.Generator) -> None:
        self.side, self.rng = side, rng
        self.image = Image.new("RGB", (side, side))
        self.draw = ImageDraw.Draw(self.image)
        self.horizon = int(side * rng.uniform(0.5, 0.66))

    def shade(self, colour: Colour) -> Colour:
        """The colour, each channel up to 6 % lighter or darker."""
        return tuple(int(np.clip(c * self.rng.uniform(0.94, 1.06), 0, 255)) for c in colour)  # type: ignore[return-value]

    def fill(self, above: Colour, below: Colour) -> None:
        self.draw.rectangle((0, 0, self.side, self.horizon), fill=self.shade(above))
        self.ground(below)

    def ground(self, colour: Colour) -> None:
        self.draw.rectangle((0, self.horizon, self.side, self.side), fill=self.shade(colour))

    def disc(self, x: float, y: float, radius: float, colour: Colour) -> None:
        """A disc; x, y and radius in pixels."""
        self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def beach(canvas: Canvas) -> None:
    side = canvas.side
    canvas.fill((140, 205, 245), (238, 214, 160))
    canvas.draw.rectangle((0, canvas.horizon - side // 7, side, canvas.horizon), fill=canvas.shade((40, 130, 190)))
    canvas.disc(canvas.rng.uniform(0.1, 0.9) * side, side * 0.14, side * 0.09, (255, 240, 150))


def grass(canvas: Canvas) -> None:
    side, rng = canvas.side, canvas.rng
    canvas.fill((165, 215, 250), (105, 185, 75))
    for x in (rng.uniform(0, 0.5), rng.uniform(0.5, 1)):
        hill = ((x - 0.35) * side, canvas.horizon - side * 0.13, (x + 0.35) * side, canvas.horizon + side * 0.2)
        canvas.draw.ellipse(hill, fill=canvas.shade((80, 155, 65)))
    canvas.ground((105, 185, 75))


def snow(canvas: Canvas) -> None:
    side, rng, horizon = canvas.side, canvas.rng, canvas.horizon
    canvas.fill((190, 210, 228), (246, 249, 253))
    for x in (rng.uniform(0, 0.4), rng.uniform(0.6, 1)):
        peak = horizon - side * rng.uniform(0.16, 0.3)
        mountain = [((x - 0.3) * side, horizon), (x * side, peak), ((x + 0.3) * side, horizon)]
        canvas.draw.polygon(mountain, fill=canvas.shade((145, 165, 190)))


def night(canvas: Canvas) -> None:
    side, rng = canvas.side, canvas.rng
    canvas.fill((18, 20, 52), (38, 42, 62))
    canvas.disc(rng.uniform(0.12, 0.88) * side, rng.uniform(0.08, 0.2) * side, side * 0.08, (245, 240, 205))
    for x, y in rng.uniform(0, 1, (4, 2)):
        canvas.disc(x * side, y * canvas.horizon * 0.9, side * 0.012, (235, 235, 220))


def city(canvas: Canvas) -> None:
    side, rng = canvas.side, canvas.rng
    canvas.fill((205, 210, 215), (120, 120, 125))
    x = -rng.uniform(0, 0.1)
    while x < 1:
        width, top = rng.uniform(0.16, 0.26), canvas.horizon - side * rng.uniform(0.2, 0.46)
        block = (x * side, top, (x + width) * side, canvas.horizon)
        canvas.draw.rectangle(block, fill=canvas.shade((150, 150, 165)), outline=(110, 110, 125), width=side // 100)
        for y in np.arange(top + side * 0.05, canvas.horizon - side * 0.06, side * 0.1):
            for column in (0.3, 0.7):
                middle = (x + width * column) * side
                window = (middle - side * 0.02, y, middle + side * 0.02, y + side * 0.045)
                canvas.draw.rectangle(window, fill=(205, 200, 175))
        x += width


def table(canvas: Canvas) -> None:
    side, horizon = canvas.side, canvas.horizon
    canvas.fill((232, 222, 205), (165, 110, 65))
    for k in (1, 2):
        y = horizon + (side - horizon) * k / 3
        canvas.draw.line((0, y, side, y), fill=canvas.shade((140, 90, 50)), width=side // 90)


PAINTERS: dict[str, Callable[[Canvas], None]] = {
    "beach": beach,
    "grass": grass,
    "snow": snow,
    "night": night,
    "city": city,
    "table": table,
}


def background(place: str, side: int, rng: np.random.Generator) -> Image.Image:
    """An image of an empty place with sides of `side` pixels."""
    canvas = Canvas(side, rng)
    PAINTERS[place](canvas)
    return canvas.image
