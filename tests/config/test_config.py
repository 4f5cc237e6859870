"""Recipes: what is read, what is refused, and how it is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from finetune.config import recipes
from finetune.config.load import dump_recipe, load_recipe, parse_recipe
from finetune.config.recipe import Recipe, json_schema
from finetune.core.errors import BadInput
from finetune.methods.lora import LoRA

MINIMAL = {"data": {"photos": "photos", "class_noun": "dog"}, "method": {"kind": "lora"}, "optim": {"kind": "adamw"}}


def test_a_recipe_is_its_sections_constructors() -> None:
    recipe = parse_recipe(MINIMAL | {"method": {"kind": "lora", "rank": 5}})
    assert recipe.method == LoRA(rank=5)
    assert recipe.base.source == "tiny"
    assert recipe.data.photos.is_absolute()


def test_overrides_are_yaml_and_win() -> None:
    recipe = parse_recipe(
        MINIMAL, ["method.rank=3", "base=other/base", "data.templates=['a {token}']", "run.ema=0.99"]
    )
    assert (recipe.method.rank, recipe.base.source, recipe.run.ema) == (3, "other/base", 0.99)
    assert recipe.data.templates == ["a {token}"]


def test_another_kind_does_not_inherit_the_old_kinds_keys() -> None:
    recipe = parse_recipe(MINIMAL | {"method": {"kind": "lora", "rank": 5}}, ["method.kind=full"])
    assert recipe.method.kind == "full"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["method.rnk=4"], "'method.rnk'; did you mean 'method.rank'"),
        (["runn.steps=4"], "'runn'; did you mean 'run'"),
        (["run.stesp=4"], "'run.stesp'; did you mean 'run.steps'"),
        (["optim.lr=-1"], "optim.lr is -1: give more than 0"),
        (["prior.kind=class_image"], "prior"),
        (["run.steps=many"], "run.steps is 'many'"),
        (["nonsense"], "section.key=value"),
        (["optim.kind=schedule_free", "run.ema=0.9"], "run.ema is 0.9 but optim.kind schedule_free averages"),
        (["optim.kind=schedule_free", "optim.schedule=cosine"], "leave optim.schedule out"),
        (
            ["optim.kind=prodigy", "method.parts=[denoiser, text_encoders]", "optim.text_lr=1"],
            "leave optim.text_lr out",
        ),
        (["optim.kind=lion8bit", "optim.eps=1e-6"], "optim.eps"),
        (["run.batch_size=3", "run.accumulate=2"], "run.batch_size 3 can't be split"),
        (["data.class_noun=null"], "data.class_noun is missing"),
        (["prior.kind=frozen_base", "data.class_noun=null", "data.templates=['{token}']"], "class_noun is missing"),
        (["prior.kind=frozen_base", "prior.count=3"], "there is no setting 'prior.count'"),
        (["prior.kind=distance", "prior.weight=-1"], "prior.weight is -1"),
    ],
)
def test_bad_recipes_get_one_sentence(change: list[str], said: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse_recipe(MINIMAL, change)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_section_is_named() -> None:
    with pytest.raises(BadInput, match="'data' is missing"):
        parse_recipe({"method": {"kind": "lora"}, "optim": {"kind": "adamw"}})


def test_dump_and_load_is_the_same_recipe(tmp_path: Path) -> None:
    recipe = parse_recipe(MINIMAL, ["prior.kind=class_images", "prior.count=7"])
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    assert load_recipe(file) == recipe


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: [1")
    (tmp_path / "b.yaml").write_text("- 1\n")
    with pytest.raises(BadInput, match="not valid YAML"):
        load_recipe(tmp_path / "a.yaml")
    with pytest.raises(BadInput, match="sections"):
        load_recipe(tmp_path / "b.yaml")
    with pytest.raises(BadInput, match="did you mean 'dreambooth-lora'"):
        load_recipe("dreambooth-lor")


@pytest.mark.parametrize("name", recipes.names())
def test_every_shipped_recipe_is_valid_and_begins_with_its_command(name: str) -> None:
    recipe = load_recipe(name)
    lines = recipes.find(name).read_text().splitlines()
    assert lines[0].startswith("# finetune ")
    assert recipes.summary(recipes.find(name))
    assert isinstance(recipe, Recipe)
    assert sum(len(v) if isinstance(v, dict) else 1 for v in yaml.safe_load("\n".join(lines)).values()) <= 20


def test_a_contradiction_of_sections_is_told_without_an_empty_name() -> None:
    odd = MINIMAL | {"method": {"kind": "dora"}, "prior": {"kind": "distance"}}
    with pytest.raises(BadInput, match=r"^the recipe: prior\.kind is distance") as caught:
        parse_recipe(odd)
    assert ": :" not in str(caught.value)


def test_a_class_prompt_has_no_token() -> None:
    odd = MINIMAL | {"prior": {"kind": "class_images", "prompt": "a {token} {noun}"}}
    with pytest.raises(BadInput, match=r"prior\.prompt has \{token\}"):
        parse_recipe(odd)


def test_the_schema_knows_every_section() -> None:
    assert set(json_schema()["properties"]) == set(Recipe.model_fields)


def test_docs_name_every_key() -> None:
    text = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    missing = [key for key in _keys(json_schema()) if f"`{key}`" not in text]
    assert not missing


def _keys(schema: dict) -> set[str]:
    return {key for definition in schema["$defs"].values() for key in definition.get("properties", {})}


def test_the_distance_is_refused_where_a_method_does_not_measure_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoRA, "measures_distance", False)
    with pytest.raises(BadInput, match=r"prior\.kind is distance, which method\.kind lora does not measure"):
        parse_recipe(MINIMAL, ["prior.kind=distance"])
