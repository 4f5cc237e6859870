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
    named = [text.partition("=")[0] for text in typed]
    shipped = find(source).parent == folder()
    if shipped and not _is_given("data.photos", named) and not recipe.data.photos.exists():
        raise BadInput(
            f"data.photos is missing: the recipe {source!r} trains on your photos, so give their folder, as "
            f"data.photos=FOLDER (the recipe's own {recipe.data.photos.name!r} is not here)"
        )


def borrowed_words(recipe: Recipe, given: Sequence[str]) -> list[str]:
    """Lines about words for the subject that stand in a shipped recipe, while the photos are somebody's own.

    given: the keys of the settings that replace the recipe's own.
    """
    values = {"data.class_noun": recipe.data.class_noun}
    if "embedding" in recipe.method.artifacts:  # a LoRA has another `init`
        values["method.init"] = getattr(recipe.method, "init", None)
    if not _is_given("data.photos", given) and recipe.data.photos.is_relative_to(examples()):
        return []
    return [
        f"{key} is {value!r}, which is the recipe's own example: give {key}={WORDS[key]} if your photos show another "
        "thing"
        for key, value in values.items()
        if value is not None and not _is_given(key, given)
    ]


def _is_given(key: str, given: Sequence[str]) -> bool:
    return any(is_in(key, name) for name in given)
