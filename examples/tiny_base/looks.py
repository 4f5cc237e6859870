"""What the tiny world holds: facts in words, looks, named things, and the subjects that no training image shows.

    python examples/tiny_base/looks.py --sheet sheet.png                 # a contact sheet to look at
    python examples/tiny_base/looks.py --photos examples/subject_mug     # the photos of the demo's subject

Four kinds of images. *Captioned*: facts that words can say. *Named*: things like "bolo mug", which look the same in
every image, as the named things do that a real base knows. *Wild*: random colours, for the VAE and the judge only.
*Subjects*: development subjects, and held-out ones that a rule with a fixed seed chose before anything was tuned.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from places import PLACES
from shapes import CLASSES, LOGOS, WORN, Colour
from world import PIXELS, Look, Scene, pose, render

COLOURS: dict[str, Colour] = {
    "red": (214, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 215, 50),
    "green": (50, 160, 70),
    "blue": (45, 95, 210),
    "purple": (135, 60, 175),
    "pink": (245, 140, 185),
    "brown": (125, 80, 45),
    "black": (66, 64, 74),
    "white": (244, 243, 240),
}
PATTERNS = ("plain", "striped", "dotted")
NAMES = tuple(
    """bolo kiri tavo nuru pemi sado lufa rima zeko wipu dabo feni goru hami jolu kesa lomi mavu nebo pilu
    quri rago sumi teva voki wano yeli zuma bimo cavu deko falu gimo hebu jaro kulo lavi mego noda puri
    rofi selu tamo vibu wega yoru zilo bado""".split()
)


@dataclass(frozen=True)
class Facts:
    """What an image shows, in words. Of a named thing the words for its look are not said."""

    kind: str
    colour: str
    pattern: str
    place: str
    second: str | None = None  # the colour of the lower half
    logo: str | None = None
    logo_colour: str | None = None
    worn: str | None = None
    name: str | None = None


def held_out(facts: Facts) -> bool:
    """Whether a combination is held out from training. One in six is, chosen by arithmetic that covers all words
    evenly."""
    code = CLASSES.index(facts.kind) + 2 * list(COLOURS).index(facts.colour)
    return (code + PATTERNS.index(facts.pattern) + 3 * PLACES.index(facts.place)) % 6 == 0


def _one_of(rng: np.random.Generator, words: tuple[str, ...] | list[str], *but: str | None) -> str:
    return str(rng.choice([word for word in words if word not in but]))


def random_facts(rng: np.random.Generator) -> Facts:
    """Facts of a thing without a name: two tones, logo and something worn in about a third each."""
    colours = list(COLOURS)
    colour = _one_of(rng, colours)
    facts = Facts(_one_of(rng, CLASSES), colour, _one_of(rng, PATTERNS), _one_of(rng, PLACES))
    if rng.random() < 0.3:
        facts = replace(facts, second=_one_of(rng, colours, colour))
    if rng.random() < 0.4:
        shape = _one_of(rng, list(LOGOS))
        facts = replace(facts, logo=shape, logo_colour=_one_of(rng, colours, colour, facts.second))
    if rng.random() < 0.25:
        facts = replace(facts, worn=_one_of(rng, list(WORN)))
    return facts


def training_facts(rng: np.random.Generator) -> Facts:
    while held_out(facts := random_facts(rng)):
        pass
    return facts


def _near(colour: str, rng: np.random.Generator) -> Colour:
    jitter = np.clip(np.array(COLOURS[colour]) + rng.integers(-12, 13, 3), 0, 255)
    return tuple(int(c) for c in jitter)  # type: ignore[return-value]


def look_of(facts: Facts, rng: np.random.Generator) -> Look:
    """The look that facts say, with colours that vary a little; of a named thing exactly its own look."""
    if facts.name is not None:
        return replace(NAMED[facts.name], worn=facts.worn)
    return Look(
        facts.kind,
        _near(facts.colour, rng),
        facts.pattern,
        second=_near(facts.second, rng) if facts.second else None,
        logo=facts.logo,
        logo_colour=_near(facts.logo_colour, rng) if facts.logo_colour else (255, 255, 255),
        worn=facts.worn,
    )


def _colour(rng: np.random.Generator) -> Colour:
    return tuple(int(c) for c in rng.integers(0, 256, 3))  # type: ignore[return-value]


def far(a: Colour, b: Colour, least: float = 90.0) -> bool:
    """Whether two colours are clearly different (Euclidean in sRGB, of 441 at most)."""
    return float(np.linalg.norm(np.subtract(a, b))) >= least


def wild_look(rng: np.random.Generator, kind: str | None = None) -> Look:
    """A look with random colours, tones, pattern, logo and something worn."""
    return Look(
        kind or _one_of(rng, CLASSES),
        _colour(rng),
        _one_of(rng, PATTERNS),
        _colour(rng),
        _colour(rng) if rng.random() < 0.5 else None,
        _one_of(rng, list(LOGOS)) if rng.random() < 0.5 else None,
        _colour(rng),
        _one_of(rng, list(WORN)) if rng.random() < 0.25 else None,
    )


def clear_look(rng: np.random.Generator, kind: str) -> Look:
    """A look as a subject has: each of its details is there and can be told from what lies beside it."""
    while True:
        look = replace(wild_look(rng, kind), worn=None, logo=_one_of(rng, list(LOGOS)))
        if rng.random() < 0.7:
            look = replace(look, second=_colour(rng))
        pattern = look.pattern if look.second is None else "plain"
        look = replace(look, pattern=pattern)
        beside = [look.body] + ([look.second] if look.second else []) + ([look.mark] if pattern != "plain" else [])
        parts = [*beside, look.logo_colour]
        if all(far(a, b) for k, a in enumerate(parts) for b in parts[:k] if a is not None and b is not None):
            return look


def differs(a: Look, b: Look) -> bool:
    """Whether nobody would take one look for the other: another kind, or another body and another logo."""
    return a.kind != b.kind or (far(a.body, b.body) and (a.logo, a.logo_colour) != (b.logo, b.logo_colour))


def _distinct(seed: int, count: int, others: list[Look]) -> list[Look]:
    """`count` clear looks, class by class, none of which is like another one or like `others`."""
    rng, looks = np.random.default_rng(seed), list(others)
    for k in range(count):
        look = clear_look(rng, CLASSES[k % len(CLASSES)])
        while not all(differs(look, other) for other in looks):
            look = clear_look(rng, CLASSES[k % len(CLASSES)])
        looks.append(look)
    return looks[len(others) :]


DEVELOPMENT: dict[str, Look] = {
    "mug": Look("mug", (20, 150, 150), second=(250, 165, 60), logo="star", logo_colour=(255, 250, 235)),
    "backpack": Look("backpack", (60, 65, 90), second=(150, 205, 60), logo="circle", logo_colour=(250, 90, 120)),
    "car": Look("car", (240, 235, 225), second=(20, 140, 160), logo="square", logo_colour=(205, 40, 60)),
    "fish": Look("fish", (40, 40, 46), "striped", mark=(240, 130, 30), logo="heart", logo_colour=(120, 220, 240)),
}
NAMED = dict(zip(NAMES, _distinct(11, len(NAMES), list(DEVELOPMENT.values())), strict=True))
# two of each class; seed 2026 was written down before the base of version 2 or any recipe for it existed
HELD_OUT = {
    f"{look.kind}-{1 + k // len(CLASSES)}": look
    for k, look in enumerate(_distinct(2026, 2 * len(CLASSES), [*DEVELOPMENT.values(), *NAMED.values()]))
}
SUBJECTS = DEVELOPMENT | HELD_OUT


def _of_kind(kind: str, seed: int, count: int, logo: str | None = None) -> list[Look]:
    """Clear looks of a kind, with `logo` if one is given, none of which is like a look above."""
    rng, looks = np.random.default_rng(seed), [*DEVELOPMENT.values(), *NAMED.values(), *HELD_OUT.values()]
    others = len(looks)
    while len(looks) < count + others:
        look = clear_look(rng, kind)
        if logo in (None, look.logo) and all(differs(look, other) for other in looks):
            looks.append(look)
    return looks[others:]


# for development too: made after the held-out cars had lost their moons, whose left and right are not alike, as the
# logos of DEVELOPMENT are; and after "a ball" had become the held-out balls, where DEVELOPMENT has none
MOONS = {f"moon-{1 + k}": look for k, look in enumerate(_of_kind("car", 41, 4, "moon"))}
BALLS = {f"dev-ball-{1 + k}": look for k, look in enumerate(_of_kind("ball", 43, 2))}
FOR_DEVELOPMENT = DEVELOPMENT | MOONS | BALLS
EVERY = SUBJECTS | MOONS | BALLS
PHOTO_PLACES = ("table", "grass", "table", "grass", "table")
DEMO = next(iter(HELD_OUT))  # the subject of `finetune demo`: the first one that the seed gave


def named_facts(rng: np.random.Generator) -> Facts:
    name = _one_of(rng, NAMES)
    worn = _one_of(rng, list(WORN)) if rng.random() < 0.2 else None
    return Facts(NAMED[name].kind, "", "", _one_of(rng, PLACES), worn=worn, name=name)


def world_scene(rng: np.random.Generator) -> tuple[Scene, Facts]:
    """A captioned scene: one in four is of a named thing."""
    facts = named_facts(rng) if rng.random() < 0.25 else training_facts(rng)
    return pose(look_of(facts, rng), facts.place, rng), facts


def wild_scene(rng: np.random.Generator, look: Look | None = None) -> Scene:
    """A look, or a wild one, in a random place."""
    shown = look or wild_look(rng)
    return pose(shown, _one_of(rng, PLACES), rng)


def world_picture(seed: int, index: int, pixels: int = PIXELS) -> tuple[Image.Image, Facts]:
    scene, facts = world_scene(np.random.default_rng((seed, index)))
    return render(scene, pixels), facts


def wild_picture(seed: int, index: int, pixels: int = PIXELS) -> Image.Image:
    return render(wild_scene(np.random.default_rng((seed, index, 1))), pixels)


def subject_picture(name: str, index: int, place: str | None = None, pixels: int = PIXELS) -> Image.Image:
    """A photo of one of the subjects, which are never in the base's training data. Its stripes always run one way."""
    rng = np.random.default_rng((77, list(EVERY).index(name), index))
    scene = pose(EVERY[name], place or PLACES[index % len(PLACES)], rng)
    return render(replace(scene, stripe_angle=90.0), pixels)


def subject_photos(name: str, folder: Path) -> None:
    """Writes five 256-pixel photos of a subject, which leave four of the six places unseen."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, place in enumerate(PHOTO_PLACES):
        subject_picture(name, 100 + number, place, pixels=256).save(folder / f"{number + 1:02d}.png")


def sheet(columns: int = 10, pixels: int = PIXELS) -> Image.Image:
    """Rows: five of captioned images, one of named things, two wild, then every subject."""
    pictures = [world_picture(0, k, pixels)[0] for k in range(5 * columns)]
    rng = np.random.default_rng(1)
    pictures += [render(pose(NAMED[name], "table", rng), pixels) for name in NAMES[:columns]]
    pictures += [wild_picture(0, k, pixels) for k in range(2 * columns)]
    pictures += [subject_picture(name, k, pixels=pixels) for k, name in enumerate(SUBJECTS)]
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (columns * pixels, rows * pixels))
    for k, picture in enumerate(pictures):
        page.paste(picture, ((k % columns) * pixels, k // columns * pixels))
    return page


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--photos", type=Path)
    arguments = parser.parse_args()
    if arguments.sheet:
        sheet().save(arguments.sheet)
    if arguments.photos:
        subject_photos(DEMO, arguments.photos)
