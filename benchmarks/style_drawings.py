"""Drawings in six synthetic styles, of scenes of the tiny base's world (examples/tiny_base/world.py).

    python benchmarks/style_drawings.py --sheet sheet.png      # a contact sheet to look at

A style is a function of a rendered image. DEVELOPMENT styles may be looked at while recipes are chosen. HELD_OUT ones
are of other kinds or other inks; they are for results only. Which is which was fixed before the first training.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "tiny_base"))

from captions import full_caption  # noqa: E402
from looks import Facts, held_out, look_of, random_facts  # noqa: E402
from shapes import CLASSES  # noqa: E402
from world import PIXELS, pose, render  # noqa: E402

Inks = list[tuple[int, int, int]]  # from dark to light
SIDE = 256  # pixels of a drawing
SHOWN = ("mug", "ball", "car", "fish")  # what the drawings show
NEVER_SHOWN = ("house", "backpack")  # the base knows them; no drawing shows them


def lines(image: Image.Image, inks: Inks) -> Image.Image:
    """Ink along the edges, on paper."""
    smooth = np.asarray(image.convert("RGB").filter(ImageFilter.GaussianBlur(2)), np.float32)
    steep = sum(np.hypot(*np.gradient(smooth[:, :, channel])) for channel in range(3))
    thick = Image.fromarray((np.clip(steep / 24, 0, 1) * 255).astype(np.uint8)).filter(ImageFilter.MaxFilter(3))
    return _between(np.asarray(thick, np.float32)[..., None] / 255, inks[-1], inks[0])


def posterised(image: Image.Image, inks: Inks) -> Image.Image:
    """Each brightness in one ink."""
    grey = _grey(image.filter(ImageFilter.MedianFilter(5)))
    levels = np.minimum((grey * len(inks)).astype(int), len(inks) - 1)
    return Image.fromarray(np.array(inks, np.uint8)[levels])


def hatched(image: Image.Image, inks: Inks) -> Image.Image:
    """Slanted strokes, the thicker the darker."""
    ys, xs = np.mgrid[0:SIDE, 0:SIDE]
    wave = ((xs + ys) / 20) % 1
    return _between((wave < 0.85 * (1 - _grey(image)))[..., None].astype(np.float32), inks[-1], inks[0])


def halftone(image: Image.Image, inks: Inks) -> Image.Image:
    """Dots in a turned grid, the larger the darker."""
    ys, xs = np.mgrid[0:SIDE, 0:SIDE]
    u, v = ((xs + 0.5 * ys) / 22) % 1 - 0.5, ((ys - 0.5 * xs) / 22) % 1 - 0.5
    dots = np.hypot(u, v) < 0.68 * np.sqrt(1 - _grey(image))
    return _between(dots[..., None].astype(np.float32), inks[-1], inks[0])


def mosaic(image: Image.Image, inks: Inks) -> Image.Image:
    """Square tiles of one colour each, tinted, with joints between them."""
    tiles = image.resize((16, 16), Image.Resampling.BOX).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    ys, xs = np.mgrid[0:SIDE, 0:SIDE]
    joints = ((xs % 16 < 3) | (ys % 16 < 3))[..., None]
    tinted = 0.6 * np.asarray(tiles, np.float32) + 0.4 * np.array(inks[-1], np.float32)
    return Image.fromarray(np.where(joints, np.array(inks[0]), tinted).astype(np.uint8))


def _grey(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L"), np.float32) / 255


def _between(share: np.ndarray, paper: tuple[int, int, int], ink: tuple[int, int, int]) -> Image.Image:
    mixed = (1 - share) * np.array(paper, np.float32) + share * np.array(ink, np.float32)
    return Image.fromarray(mixed.astype(np.uint8))


STYLES: dict[str, tuple[Callable[[Image.Image, Inks], Image.Image], Inks]] = {
    "blue lines": (lines, [(20, 40, 130), (246, 240, 222)]),
    "sunset": (posterised, [(60, 20, 80), (200, 50, 70), (250, 150, 50), (255, 230, 160)]),
    "hatched": (hatched, [(50, 40, 35), (235, 225, 200)]),
    "halftone": (halftone, [(190, 30, 90), (250, 245, 200)]),
    "mosaic": (mosaic, [(30, 60, 60), (90, 200, 180)]),
    "forest": (posterised, [(15, 40, 45), (25, 110, 90), (140, 190, 90), (240, 245, 200)]),
}
DEVELOPMENT, HELD_OUT = ("blue lines", "sunset", "hatched"), ("halftone", "mosaic", "forest")


def facts_of(kind: str, number: int) -> Facts:
    """What scene `number` with a kind of thing shows: without details, which a drawing hides."""
    rng = np.random.default_rng((88, CLASSES.index(kind), number))
    while (facts := random_facts(rng)).kind != kind or held_out(facts):
        pass
    return replace(facts, second=None, logo=None, logo_colour=None, worn=None)


def caption_of(facts: Facts) -> str:
    """A caption that states everything, without a style."""
    return full_caption(facts).removeprefix("a photo of ")


def drawing(style: str, facts: Facts, number: int) -> Image.Image:
    """A drawing in a style, SIDE pixels a side. `number` chooses pose, light and exact colours."""
    rng = np.random.default_rng((89, number))
    made, inks = STYLES[style]
    return made(render(pose(look_of(facts, rng), facts.place, rng), SIDE), inks)


def write_drawings(style: str, folder: Path, count: int = 40) -> Path:
    """Writes `count` drawings of the things in SHOWN, each with a caption file that does not name the style."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        facts = facts_of(SHOWN[number % len(SHOWN)], number)
        drawing(style, facts, number).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(caption_of(facts), encoding="utf-8", newline="\n")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sheet", type=Path, required=True)
    asked = parser.parse_args()
    side, things = PIXELS, (*SHOWN, *NEVER_SHOWN)
    page = Image.new("RGB", (side * len(things), side * len(STYLES)))
    for row, style in enumerate(STYLES):
        for column, kind in enumerate(things):
            small = drawing(style, facts_of(kind, 1000), 1000).resize((side, side), Image.Resampling.BOX)
            page.paste(small, (column * side, row * side))
    page.save(asked.sheet)


if __name__ == "__main__":
    main()
