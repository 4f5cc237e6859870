"""Captions for the tiny world: each attribute is stated about 60 % of the time, one caption in ten is empty."""

from __future__ import annotations

import numpy as np
from world import Facts

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


def caption(facts: Facts, rng: np.random.Generator, empty: float = 0.1) -> tuple[str, dict[str, str]]:
    """A random caption of an image, and the attributes that it states: kind, colour, pattern, place (or
    "unstated")."""
    stated = {"kind": facts.kind, "colour": UNSTATED, "pattern": UNSTATED, "place": UNSTATED}
    if rng.random() < empty:
        return "", dict.fromkeys(stated, UNSTATED)
    for name in ("colour", "pattern", "place"):
        if rng.random() < 0.6:
            stated[name] = getattr(facts, name)
    words = [stated[name] for name in ("colour", "pattern") if stated[name] != UNSTATED]
    text = str(rng.choice(TEMPLATES)).format(thing=" ".join([*words, facts.kind]))
    if stated["place"] != UNSTATED:
        text += " " + PLACE_PHRASES[facts.place]
    return text, stated


def full_caption(facts: Facts) -> str:
    """A caption that states every attribute, for the evaluation."""
    return f"a photo of a {facts.colour} {facts.pattern} {facts.kind} {PLACE_PHRASES[facts.place]}"
