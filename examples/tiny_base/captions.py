"""Captions for the tiny world: what is there is stated about 60 % of the time, one caption in ten is empty."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
from looks import Facts

PLACE_PHRASES = {
    "beach": "on the beach",
    "grass": "on the grass",
    "snow": "in the snow",
    "night": "at night",
    "city": "in the city",
    "table": "on a table",
}
TEMPLATES = (
    "a photo of a {thing}",
    "a photo of {thing}",
    "a photo of the {thing}",
    "a picture of a {thing}",
    "a {thing}",
    "{thing}",
    "the {thing}",
)
UNSTATED = "unstated"
ATTRIBUTES = ("kind", "colour", "pattern", "place", "second", "logo", "logo_colour", "worn", "name")
NEEDS = {"second": "colour", "logo_colour": "logo"}  # said only together with another word


def caption(facts: Facts, rng: np.random.Generator, empty: float = 0.1) -> tuple[str, dict[str, str]]:
    """A random caption of an image, and the attributes that it states (the others are "unstated")."""
    known = {name: value for name, value in asdict(facts).items() if value}
    stated = dict.fromkeys(ATTRIBUTES, UNSTATED)
    if rng.random() < empty:
        return "", stated
    for name in ATTRIBUTES:
        share = {"kind": 1.0, "name": 1.0, "second": 0.8, "logo_colour": 0.8}.get(name, 0.6)
        sayable = name not in NEEDS or stated[NEEDS[name]] != UNSTATED
        if name in known and sayable and rng.random() < share:
            stated[name] = known[name]
    return sentence(stated, str(rng.choice(TEMPLATES)), bool(rng.random() < 0.5)), stated


def sentence(stated: dict[str, str], template: str, wearing: bool = False) -> str:
    """The caption that states these attributes; `wearing`: "wearing a hat" instead of "with a hat"."""
    has = {name: word for name, word in stated.items() if word != UNSTATED}
    colour = " and ".join(has[name] for name in ("colour", "second") if name in has)
    words = [has.get("name", ""), colour, has.get("pattern", ""), has["kind"]]
    thing = " ".join(word for word in words if word)
    logo = " ".join(has[name] for name in ("logo_colour", "logo") if name in has)
    details = [f"a {logo}"] if logo else []
    if "worn" in has:
        details += [f"a {has['worn']}"]
    joined = " with " if not (wearing and details == [f"a {has.get('worn')}"]) else " wearing "
    text = template.format(thing=thing) + (joined + " and ".join(details) if details else "")
    return f"{text} {PLACE_PHRASES[has['place']]}" if "place" in has else text


def full_caption(facts: Facts) -> str:
    """A caption that states everything, for the evaluation."""
    return sentence({name: getattr(facts, name) or UNSTATED for name in ATTRIBUTES}, "a photo of a {thing}")
