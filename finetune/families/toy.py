"""What a person should expect of the built-in tiny base."""

from __future__ import annotations

from collections.abc import Iterable

TINY = "tiny"
KINDS = ("mug", "ball", "house", "car", "fish", "backpack")  # what examples/tiny_base/looks.py holds
REAL = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def expectation(base: str, nouns: Iterable[str | None]) -> str | None:
    """What a training on the tiny base is good for, or None for any other base. `nouns` are those of its subjects."""
    if base != TINY:
        return None
    strange = unknown_to(base, nouns)
    unknown = (
        f"It does not know {' or '.join(map(repr, strange))}: nothing will look like the photos. " if strange else ""
    )
    return (
        f"tiny is a toy model that knows six kinds of things ({', '.join(KINDS)}), drawn at 128 pixels. {unknown}"
        f"It is for trying the tool; for real photos choose a real base (dreambooth: --base {REAL}; train: base=...)"
    )


def unknown_to(base: str, nouns: Iterable[str | None]) -> list[str]:
    """Those of the nouns that the tiny base has never seen; none for any other base."""
    return [noun for noun in nouns if base == TINY and noun and not set(noun.lower().split()) & set(KINDS)]
