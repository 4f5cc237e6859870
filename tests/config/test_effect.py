"""A setting that does nothing beside the others is refused by name; the recipe that a run wrote down is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.config.effect import NEEDS
from finetune.config.load import changed_recipe, dump_recipe, load_recipe, parse_recipe
from finetune.config.recipe import Recipe
from finetune.core.errors import BadInput
from finetune.objectives.older import MOVED
from finetune.runs.folder import RunFolder

NEEDED = ["data.photos=x", "data.class_noun=dog"]

# (a setting that does nothing in the recipe `demo`, what gives it an effect)
USELESS = [
    ("data.bucket_tolerance=0.2", "data.shape=buckets"),
    ("data.crops=8", "data.crop=random"),
    ("data.keep_tags=2", "data.shuffle_tags=True"),
    ("data.tag_orders=4", "data.shuffle_tags=True"),
    ("data.mask_floor=0.3", "data.masks=auto"),
    ("objective.huber_c=0.5", "objective.loss=huber"),
    ("objective.mode_scale=0.8", "objective.density=mode"),
]
USELESS_BESIDE = [
    ("objective.gamma=3", "objective.weighting=none", "objective.weighting=min_snr"),
    ("objective.gamma=3", "objective.weighting=debiased", "objective.weighting=p2"),
    ("objective.logit_mean=1", "objective.density=cosmap", "objective.density=logit_normal"),
    ("objective.logit_std=2", "objective.density=uniform", "objective.density=auto"),
    ("data.mask_count=3", "base.inputs=depth", "base.inputs=inpaint"),
    ("data.edit_dropout=0.1", "base.inputs=inpaint", "base.inputs=edit"),
    ("data.caption_mix={'own': 1.0}", "data.captions=templates", "data.captions=auto"),
    ("sample.image_guidance=2", "base.inputs=depth", "base.inputs=edit"),
]


def refusal(*overrides: str) -> str:
    with pytest.raises(BadInput) as caught:
        load_recipe("demo", [*NEEDED, *overrides])
    said = str(caught.value)
    assert "\n" not in said
    return said


@pytest.mark.parametrize(("setting", "remedy"), USELESS)
def test_a_setting_without_effect_is_refused_with_its_remedy(setting: str, remedy: str) -> None:
    said = refusal(setting)
    key, value = setting.split("=")
    assert f"{key} is {value} but {remedy.split('=')[0]} is " in said
    assert said.endswith(f"so it has no effect: leave it out, or set {remedy}")
    load_recipe("demo", [*NEEDED, setting, remedy])


@pytest.mark.parametrize(("setting", "beside", "remedy"), USELESS_BESIDE)
def test_another_setting_may_take_the_effect_away(setting: str, beside: str, remedy: str) -> None:
    said = refusal(setting, beside)
    assert setting.replace("=", " is ") in said
    assert beside.replace("=", " is ") in said
    load_recipe("demo", [*NEEDED, setting, remedy])


def test_every_rule_is_tried_here() -> None:
    tried = {row[0].split("=")[0] for row in [*USELESS, *USELESS_BESIDE]}
    assert {needs.key for needs in NEEDS} | {f"objective.{moved.key}" for moved in MOVED} == tried


def test_a_warm_up_fits_into_the_run() -> None:
    said = refusal("run.steps=20", "optim.warmup=21")
    assert said.endswith(
        "optim.warmup is 21 but run.steps is 20, so the learning rate never reaches optim.lr: set optim.warmup to at "
        "most 20, or 0"
    )
    fits = load_recipe("demo", [*NEEDED, "run.steps=20", "optim.warmup=20"]).optim
    assert fits.factor(19, 20) == 1.0  # in the last step; a warm-up of 21 would end at 20 / 21


PIVOTAL = ("method.kind=pivotal", "optim.lr=0.002", "run.steps=100")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (
            ["optim.warmup=51"],
            "optim.warmup is 51 but the new word (method.pivot 0.5) trains in 50 of the 100 steps, so its learning "
            "rate never becomes the full one: set optim.warmup to at most 50, or 0",
        ),
        (["optim.warmup=31", "method.pivot=0.7"], "the LoRA (method.pivot 0.7) trains in 30 of the 100 steps"),
        (["optim.warmup=101"], "optim.warmup is 101 but run.steps is 100, so the learning rate never reaches optim"),
        (
            ["optim.warmup=26", "optim.schedule=cosine", "optim.schedule_steps=50"],
            "the new word (method.pivot 0.5) trains in 25 of the 100 steps, so",
        ),
        (
            ["method.pivot=0.001"],
            "the new word (method.pivot 0.001) trains in none of the 100 steps: give more run.steps, or another share",
        ),
        (["method.pivot=0.999"], "the LoRA (method.pivot 0.999) trains in none of the 100 steps"),
        (
            ["optim.schedule_steps=300"],
            "the LoRA (method.pivot 0.5) trains in none of the 100 steps, as optim.schedule_steps is 300: give more "
            "run.steps, or fewer optim.schedule_steps",
        ),
    ],
)  # fmt: skip
def test_each_half_of_pivotal_tuning_trains_at_its_full_rate(typed: list[str], said: str) -> None:
    assert said in refusal(*PIVOTAL, *typed)


@pytest.mark.parametrize(
    "typed",
    [
        ["optim.warmup=50"],
        ["optim.warmup=70", "method.pivot=0.3", "method.keep_training_token=true"],
        ["optim.warmup=20", "optim.schedule_steps=40"],
    ],
)
def test_a_warm_up_that_fits_both_halves_reaches_the_full_rate(typed: list[str]) -> None:
    """As the loop sets it, step by step."""
    recipe = load_recipe("demo", [*NEEDED, *PIVOTAL, *typed])
    optim, steps = recipe.optim, recipe.run.steps
    for window in recipe.method.named_windows.values():
        rates = [optim.factor_within(window, step, optim.schedule_steps or steps) for step in range(steps)]
        assert max(rates) == 1.0


def test_a_warm_up_ends_before_its_schedule() -> None:
    shaped = ("run.steps=100", "optim.schedule=linear", "optim.schedule_steps=50")
    assert "optim.warmup is 51 but optim.schedule_steps is 50, so the" in refusal(*shaped, "optim.warmup=51")
    load_recipe("demo", [*NEEDED, *shaped, "optim.warmup=50"])


def test_plain_data_is_checked_as_a_file_is() -> None:
    plain = load_recipe("demo", NEEDED).model_dump(mode="json")
    plain["data"]["crops"] = 8
    with pytest.raises(BadInput, match=r"^the recipe: data\.crops is 8 but data\.crop is center"):
        parse_recipe(plain)


def test_what_had_no_effect_before_does_not_stand_in_the_way_of_a_change() -> None:
    plain = load_recipe("demo", NEEDED).model_dump(mode="json")
    plain["data"]["crops"] = 8
    recipe = changed_recipe(Recipe.model_validate(plain), ["export.dtype=fp32"])
    assert (recipe.data.crops, recipe.export.dtype) == (8, "fp32")
    with pytest.raises(BadInput, match=r"^the options: export\.max_error is 0\.1 but a lora is exported exactly"):
        changed_recipe(recipe, ["export.max_error=0.1"])


@pytest.mark.parametrize("kind", ["lora", "textual_inversion"])
def test_an_error_is_bounded_only_where_a_lora_is_made(kind: str) -> None:
    said = refusal(f"method.kind={kind}", "export.max_error=0.1", "prior.kind=none", "prior.others=null")
    assert f"export.max_error is 0.1 but a {kind} is exported exactly as it was trained" in said
    load_recipe("demo", [*NEEDED, "method.kind=dora", "export.max_error=0.1"])


@pytest.mark.parametrize("prior", ["class_images", "frozen_base"])
def test_a_word_alone_needs_no_prior(prior: str) -> None:
    """The gradient of its class prompts is 0: they don't have the word. A run that has one is opened all the same."""
    said = refusal("method.kind=textual_inversion", f"prior.kind={prior}", "prior.others=null")
    assert f"prior.kind is {prior} but a textual_inversion trains only a new word" in said
    plain = load_recipe("demo", [*NEEDED, "method.kind=pivotal", "prior.others=null"]).model_dump(mode="json")
    plain["method"] = {"kind": "textual_inversion"}
    assert Recipe.model_validate(plain).prior.kind == "class_images"


def test_what_the_base_decides_is_not_guessed() -> None:
    """An inpainting base reads masks without `base.inputs`, and a flow draws logit_normal where density is auto; see
    tests/jobs/test_base_effect.py."""
    load_recipe("demo", [*NEEDED, "data.mask_count=3", "data.edit_dropout=0.1", "objective.logit_mean=1"])


def test_a_resolved_recipe_can_be_trained_again(tmp_path: Path) -> None:
    recipe = load_recipe("demo", NEEDED)
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    assert "mask_count: 8" in file.read_text(encoding="utf-8")
    assert load_recipe(file) == recipe


def test_an_older_run_is_read_with_whatever_it_was_given(tmp_path: Path) -> None:
    plain = load_recipe("demo", NEEDED).model_dump(mode="json")
    plain["data"]["crops"] = 8
    (tmp_path / "recipe.yaml").write_text(dump_recipe(Recipe.model_validate(plain)), encoding="utf-8")
    assert RunFolder(tmp_path).recipe.data.crops == 8
    with pytest.raises(BadInput, match=r"recipe\.yaml: data\.crops is 8 but data\.crop is center"):
        load_recipe(tmp_path / "recipe.yaml")


def test_a_span_of_no_schedule() -> None:
    said = refusal("optim.schedule=constant", "optim.schedule_steps=900")
    assert "optim.schedule_steps is 900 but optim.schedule is constant" in said
    load_recipe("demo", [*NEEDED, "optim.schedule_steps=900"])
