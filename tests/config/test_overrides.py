"""What a person types is data: a folder or a word is taken as it is, whatever YAML would make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finetune.cli.main import run as command
from finetune.config.load import load_recipe, parse_recipe
from finetune.core.errors import BadInput

NAMES = [
    "dog #2", "My Photos #1", "[2024] dog", "2024", "dog: best", "@dog", "'s dog", "{dog}", "dog ", "no", "null ",
    "1e3", "!tag", "*star", "&and", "- dash", "a, b", "%20", "`x`", "dog's #1: best", "日本",
]  # fmt: skip
WORDS = ["no", "dog #1", "2024", "yes", "null-pointer", "a: b", "[x]", "1.5", "@home", "über"]


@pytest.mark.parametrize("name", NAMES)
def test_folders_are_taken_as_they_are_in_every_form(name: str) -> None:
    place = Path("/photos") / name
    typed = load_recipe("demo", [f"data.photos={place}", "data.class_noun=mug"])
    given = load_recipe("demo", [("data.photos", place), ("data.class_noun", "mug")])
    named = load_recipe("demo", {"data.photos": str(place), "data.class_noun": "mug"})
    assert typed.data.photos == given.data.photos == named.data.photos == place
    assert (
        load_recipe("demo", [f"data.photos={place}", "data.class_noun=mug", f"base={name}x"]).base.source == f"{name}x"
    )


@pytest.mark.parametrize("word", WORDS)
def test_words_are_taken_as_they_are(word: str) -> None:
    typed = load_recipe("demo", ["data.photos=x", f"data.class_noun={word}", f"sample.negative={word}"])
    given = load_recipe("demo", {"data.photos": "x", "data.class_noun": word, "sample.negative": word})
    assert typed == given
    assert typed.data.class_noun == word


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("run.steps=7", ("run", "steps"), 7),
        ("sample.prompts=['a, b', c]", ("sample", "prompts"), ["a, b", "c"]),
        ("data.class_noun='mug'", ("data", "class_noun"), "mug"),
        ("data.resolution=null", ("data", "resolution"), None),
        ("base.revision=null", ("base", "revision"), None),
        ("base={source: tiny, revision: main}", ("base", "revision"), "main"),
        ("run.dir=runs/a #1", ("run", "dir"), Path("runs/a #1")),
    ],
)
def test_everything_else_is_still_yaml(text: str, key: tuple[str, str], value: Any) -> None:
    recipe = load_recipe("demo", ["data.photos=x", "data.class_noun=mug", text])
    assert getattr(getattr(recipe, key[0]), key[1]) == value


def test_a_dictionary_with_an_unknown_key_is_refused() -> None:
    with pytest.raises(BadInput, match=r"run\.setps"):
        load_recipe("demo", {"data.photos": "x", "data.class_noun": "mug", "run.setps": 3})


@pytest.mark.parametrize("name", ["dog #2", "[2024] dog", "dog: best", "{dog}", "'s dog", "no"])
def test_the_short_way_trains_the_folder_that_was_named(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside it lies the folder that YAML would have made of it, with other photos."""
    for folder, colours in ((name, ("red", "blue")), ("dog", ("black",))):
        (tmp_path / folder).mkdir()
        for colour in colours:
            Image.new("RGB", (64, 64), colour).save(tmp_path / folder / f"{colour}.png")
    code, said = command(["dreambooth", str(tmp_path / name), "--class-noun", "mug", "--dry-run", "prior.kind=none"])
    assert code == 0, said
    assert "2 photo" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("run.step=10", "there is no setting 'run.step'; did you mean 'run.steps'?"),
        ("lr=0.01", "there is no setting 'lr'; did you mean 'optim.lr'?"),
        ("steps=30", "there is no setting 'steps'; did you mean 'run.steps' or 'prior.steps' or 'sample.steps'?"),
        ("run.steps=0", "run.steps is 0: give at least 1"),
    ],
)
def test_a_fault_in_what_was_typed_is_not_blamed_on_the_recipe_file(typed: str, said: str) -> None:
    with pytest.raises(BadInput) as refused:
        load_recipe("demo", ["data.photos=x", typed])
    assert str(refused.value) == said


def test_a_fault_in_the_file_names_the_file_also_beside_overrides(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("data: {photos: x}\nmethod: {kind: lora}\noptim: {kind: adamw}\nrun: {steps: 0}\n")
    with pytest.raises(BadInput, match=r"mine\.yaml: run\.steps is 0: "):
        load_recipe(recipe, ["run.seed=1"])


def test_a_folder_as_a_recipe_is_told_what_to_do_with_it(tmp_path: Path) -> None:
    with pytest.raises(
        BadInput, match=r"is a folder and no recipe: .*finetune dreambooth FOLDER.*finetune resume RUN"
    ):
        load_recipe(tmp_path)


@pytest.mark.parametrize("given", ["run={steps: 7, ema: 0.9}", ("run", {"steps": 7, "ema": 0.9})])
def test_a_section_that_is_given_whole_keeps_what_was_given_before(given: object) -> None:
    """`run={steps: 7}` dropped the `run.dir` before it, and the recipe's own keys."""
    recipe = load_recipe("demo", ["data.photos=x", "data.class_noun=mug", "run.dir=somewhere", given])  # type: ignore[list-item]
    assert (recipe.run.dir, recipe.run.steps, recipe.run.ema) == (Path("somewhere"), 7, 0.9)
    other = load_recipe("demo", ["data.photos=x", "data.class_noun=mug", "method={rank: 3, kind: lokr}"])
    assert (other.method.kind, other.method.rank) == ("lokr", 3)  # type: ignore[attr-defined]


MINE = {
    "data": {"photos": "x", "class_noun": "mug"},
    "method": {"kind": "lora", "rank": 64},
    "optim": {"kind": "adamw", "lr": 5e-5, "schedule": "cosine"},
    "prior": {"kind": "frozen_base"},
}


@pytest.mark.parametrize(
    "typed",
    [
        ["optim.lr=3e-5", "optim.kind=adamw8bit"],
        ["optim.lr=3e-5", "optim.kind=lion8bit"],
        ["optim={lr: 3e-5}", "optim={kind: lion8bit}"],
        ["method.rank=7", "method.kind=dora"],
        ["objective.weighting.gamma=3", "objective.weighting=min_snr"],
        ["objective.weighting.gamma=3", "objective.weighting.kind=min_snr"],
        ["prior.weight=0.3", "prior=class_images"],
        ["prior.others.count=3", "prior.others={}"],
        ["base.revision=main", "base=owner/name"],
    ],
)
def test_what_is_typed_before_a_kind_counts_as_behind_it(typed: list[str]) -> None:
    """`optim.lr=3e-5 optim.kind=adamw8bit` trained with 1e-4 and said nothing."""
    assert parse_recipe(MINE, typed) == parse_recipe(MINE, list(reversed(typed)))


def test_what_is_typed_for_one_kind_is_not_for_the_next() -> None:
    last = parse_recipe(MINE, ["optim.kind=prodigy", "optim.d0=1e-5", "optim.kind=schedule_free"])
    assert last == parse_recipe(MINE, ["optim.kind=schedule_free"])
    assert parse_recipe(MINE, ["prior.others.count=3", "prior.others=null"]).prior.others is None
    with pytest.raises(BadInput, match=r"method\.rank"):
        parse_recipe(MINE, ["method.rank=7", "method.kind=full"])


def test_a_recipes_own_rate_stays_for_the_other_forms_of_adamw() -> None:
    """docs/scale.md advises optim.kind=adamw8bit against too little memory: it set the rate and its schedule back."""
    recipe = parse_recipe(MINE, ["optim.kind=adamw8bit"])
    assert (recipe.optim.kind, recipe.optim.lr, recipe.optim.schedule) == ("adamw8bit", 5e-5, "cosine")
    left_to_profile = MINE | {"profile": "subject", "optim": {"lr": 5e-5}}
    assert parse_recipe(left_to_profile, ["optim.kind=paged_adamw8bit"]).optim.lr == 5e-5
    assert parse_recipe(left_to_profile, ["optim.kind=prodigy"]).optim.lr == 1.0
