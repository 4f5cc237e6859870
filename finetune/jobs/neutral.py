"""The prompts of everything else (`prior.others`): the recipe's, else the base's own list, else the included one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from finetune.core.errors import BadInput
from finetune.core.reading import list_items, read_utf8
from finetune.data.decoding import shown
from finetune.families.source import NEUTRAL_PROMPTS
from finetune.jobs.words import PLACEHOLDER
from finetune.training.priors.others import Others

MAX_BYTES = 1_000_000  # of a list of prompts
INCLUDED = "neutral_prompts.txt"  # the list that comes with this package


@dataclass(frozen=True)
class OtherPrompts:
    """What images of everything else are drawn for. `origin` says where the list comes from."""

    texts: tuple[str, ...]
    origin: str


def given_prompts(settings: Others) -> OtherPrompts | None:
    """The list that the recipe gives; None if it gives none.

    Raises:
        BadInput: the file is missing or can't be read, or the list has no prompts, an empty one, or one with {token}.
    """
    given, key = settings.prompts, "prior.others.prompts"
    if given is None:
        return None
    if not isinstance(given, Path):
        if any(not text.strip() for text in given):
            raise BadInput(f"{key} has an empty text: leave it out, as prior.others.empty is the share of those")
        return OtherPrompts(_checked(given, key), "of the recipe")
    if not given.is_file():
        raise BadInput(f"{key} is {str(given)!r}, which is no file: give a text file with one prompt a line")
    return OtherPrompts(
        _checked(list_items(read_utf8(given, MAX_BYTES)), f"{key} ({given})"), f"of {shown(given.name)}"
    )


def other_prompts(settings: Others, folder: Path) -> OtherPrompts:
    """The prompts for a base.

    Args:
        settings: the recipe's.
        folder: the base's, which may have a list of its own beside model_index.json. It is one of the base's files, so
            a run records its hash.

    Raises:
        BadInput: as `given_prompts`, or the base's list can't be used.
    """
    given = given_prompts(settings)
    if given is not None:
        return given
    own = base_prompts(folder)
    if own:
        return OtherPrompts(own, "of the base's own list")
    text = files("finetune.training.priors").joinpath(INCLUDED).read_text(encoding="utf-8")
    return OtherPrompts(_checked(list_items(text), INCLUDED), "of the included list")


def base_prompts(folder: Path) -> tuple[str, ...]:
    """The list beside a base's model_index.json; empty if it has none.

    Raises:
        BadInput: it can't be used.
    """
    own = folder / NEUTRAL_PROMPTS
    return _checked(list_items(read_utf8(own, MAX_BYTES)), str(own)) if own.is_file() else ()


def _checked(texts: Iterable[str], where: str) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(text.strip() for text in texts))
    if not found:
        raise BadInput(f"{where} has no prompts: write one a line, or leave prior.others.prompts out")
    for text in found:
        braces = PLACEHOLDER.search(text)
        if braces:
            raise BadInput(
                f"{where} has {braces[0]!r} ({text!r:.200}), but these images are the same for every subject: write "
                "the words themselves"
            )
    return found
