"""What a shipped recipe leaves to the person who trains: its photos, and the words for what they show."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.config.recipe import Recipe
from finetune.config.recipes import examples, find, folder
from finetune.config.sections import is_in
from finetune.core.errors import BadInput

WORDS = {"data.class_noun": "NOUN", "method.init": "WORD"}


def refuse_placeholder(source: str, recipe: Recipe, typed: Sequence[str]) -> None:
    """Refuses a shipped recipe's own folder of photos where nobody typed one and there is none.

    Raises:
        BadInput: data.photos must be given.
    """
    if _is_own("data.photos", source, typed) and not recipe.data.photos.exists():
        raise BadInput(
            f"data.photos is missing: the recipe {source!r} trains on your photos, so give their folder, as "
            f"data.photos=FOLDER (the recipe's own {recipe.data.photos.name!r} is not here)"
        )


def borrowed_words(source: str, recipe: Recipe, typed: Sequence[str]) -> list[str]:
    """Lines about words for the subject that stand in a shipped recipe, while the photos are somebody's own."""
    values = {"data.class_noun": recipe.data.class_noun}
    if "embedding" in recipe.method.artifacts:  # a LoRA has another `init`
        values["method.init"] = getattr(recipe.method, "init", None)
    if _is_own("data.photos", source, typed) and recipe.data.photos.is_relative_to(examples()):
        return []
    return [
        f"{key} is {value!r}, which is the recipe's own example: give {key}={WORDS[key]} if your photos show another "
        "thing"
        for key, value in values.items()
        if value is not None and _is_own(key, source, typed)
    ]


def _is_own(key: str, source: str, typed: Sequence[str]) -> bool:
    """Whether a value is that of a shipped recipe's file: not typed."""
    names = [text.partition("=")[0] for text in typed]
    return find(source).parent == folder() and not any(is_in(key, name) for name in names)
