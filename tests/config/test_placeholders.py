"""What a shipped recipe leaves to the person who trains."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from finetune.config.load import dump_recipe, load_recipe
from finetune.config.placeholders import refuse_placeholder
from finetune.config.recipes import folder
from finetune.core.errors import BadInput


@pytest.mark.parametrize(
    ("source", "typed", "keys"),
    [
        ("dreambooth-lora", ["data.photos=cat"], ["data.class_noun"]),
        ("dreambooth-lora", ["data.photos=cat", "data.class_noun=cat"], []),
        ("dreambooth-lora", ["data={photos: cat, class_noun: cat}"], []),
        ("textual-inversion", ["data.photos=cat"], ["method.init"]),
        ("pivotal", ["data.photos=cat", "method.init=cat"], []),
        ("style-lora", ["data.photos=drawings"], []),
        ("demo", [], []),
        ("demo", ["data.photos=cat"], ["data.class_noun"]),
    ],
)
def test_words_that_nobody_typed_are_named(source: str, typed: list[str], keys: list[str]) -> None:
    found = load_recipe(source, typed)
    assert [line.split(" is ")[0] for line in found.borrowed] == keys
    given = dict(text.split("=", 1) for text in typed)
    if "data" not in given:
        assert load_recipe(source, given).borrowed == load_recipe(source, [*given.items()]).borrowed == found.borrowed


def test_recipes_are_compared_by_their_settings_alone(tmp_path: Path) -> None:
    """What nobody typed is not a setting: it is in no file, and a copy keeps it."""
    recipe = load_recipe("dreambooth-lora", ["data.photos=cat"])
    written = tmp_path / "mine.yaml"
    written.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(written) == recipe
    assert recipe.borrowed == recipe.model_copy(update={"sample": recipe.sample}).borrowed != ()
    assert load_recipe(written).borrowed == ()


def test_a_recipe_of_ones_own_is_taken_at_its_word(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    shutil.copyfile(folder() / "dreambooth-lora.yaml", mine)
    recipe = load_recipe(mine)
    assert recipe.borrowed == ()
    refuse_placeholder(str(mine), recipe, [])


def test_photos_that_nobody_typed_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("dreambooth-lora")
    with pytest.raises(BadInput, match=r"^data\.photos is missing: .* data\.photos=FOLDER"):
        refuse_placeholder("dreambooth-lora", recipe, [])
    refuse_placeholder("dreambooth-lora", load_recipe("dreambooth-lora", ["data.photos=cat"]), ["data.photos=cat"])
    (tmp_path / "photos").mkdir()
    refuse_placeholder("dreambooth-lora", recipe, [])
