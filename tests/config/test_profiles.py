"""Defaults follow the base: which value counts, what it is on which base, where it comes from, and who is blamed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.config import recipes
from finetune.config.load import changed_recipe, dump_recipe, load_recipe, parse_recipe, read_recipe, settled
from finetune.config.profiles import defaults_of, profiles, rows
from finetune.config.recipe import Recipe
from finetune.core.errors import BadInput
from finetune.families.known import KnownBase, known_base
from finetune.families.registry import FAMILIES
from finetune.jobs.estimate import report
from finetune.jobs.plan import plan
from finetune.jobs.train import check_run
from finetune.runs.plan import plan_rows, shared_rows

ROOT = Path(__file__).parents[2]
BEFORE: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "before_profiles.yaml").read_text(encoding="utf-8"))
NEEDED = ["data.photos=photos", "data.class_noun=mug"]
WRITTEN = {name: yaml.safe_load(recipes.find(name).read_text(encoding="utf-8")) for name in recipes.names()}
FOR_ANY = sorted(name for name, raw in WRITTEN.items() if "profile" in raw and "base" not in raw)
HUB = "owner/never-fetched"
TINY_MEASURED = "tiny: measured, docs/results.md"


def plain(recipe: Recipe) -> dict[str, Any]:
    """Everything but where values come from, and where the examples are."""
    values = recipe.model_dump(mode="json")
    del values["profile"], values["data"]["photos"]
    return values


def without_names(recipe: Recipe) -> dict[str, Any]:
    values = plain(recipe)
    values["run"]["name"] = values["sample"]["prompts"] = None
    return values


def value_of(recipe: Recipe, key: str) -> Any:
    section, name = key.split(".")
    return recipe.model_dump(mode="json")[section].get(name)


# the same numbers as before


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_on_its_base_is_what_it_was_when_it_fixed_its_own_numbers(name: str) -> None:
    base = BEFORE[name].get("base", "stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert plain(load_recipe(name, {"base": base})) == plain(parse_recipe(BEFORE[name] | {"base": base}))


@pytest.mark.parametrize("name", FOR_ANY)
def test_no_real_family_changed(name: str, tiny_bases: dict[str, Path]) -> None:
    for base in map(str, tiny_bases.values()):  # real families; too small to be of the tiny base's size
        recipe = load_recipe(name, {"base": base})
        assert recipe.profile.settled
        assert plain(recipe) == plain(parse_recipe(BEFORE[name] | {"base": base}))


def test_the_shipped_recipes_are_all_compared() -> None:
    assert sorted(BEFORE) == recipes.names()
    assert FOR_ANY == ["dreambooth-full", "dreambooth-lora", "pivotal", "style-lora", "textual-inversion"]


@pytest.mark.parametrize(
    ("name", "measured", "apart"),
    [
        ("dreambooth-lora", "demo", ["run.batch_size=4", "prior.target=base", "prior.weight=3"]),
        ("dreambooth-full", "demo-full", []),
    ],
)
def test_on_the_tiny_base_a_subject_has_the_settings_that_were_measured(
    name: str, measured: str, apart: list[str]
) -> None:
    """The demo, which somebody waits for, takes two photos a step, and its class images aim at themselves."""
    settings = ["base=tiny", "data.photos=photos", "data.class_noun=mug"]
    assert without_names(load_recipe(name, settings)) == without_names(load_recipe(measured, [*settings, *apart]))


def test_on_the_tiny_base_a_style_has_the_settings_of_its_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from style import TINY

    own = ("prior.guidance=3.0", "prior.count=40", "prior.steps=12")
    training = [setting for setting in TINY if not setting.startswith(("sample.", "export."))]
    wanted = parse_recipe(BEFORE["style-lora"], [*training, *own, "sample.guidance=5.0"])
    assert plain(load_recipe("style-lora", ["base=tiny"])) == plain(wanted)


# which profile

SIZES = [(9_070_827, True), (1_000_000, True), (50_000_000, True), (999_999, False), (859_520_964, False)]


@pytest.mark.parametrize(("parameters", "small"), SIZES)
def test_a_base_of_the_tiny_bases_size_is_trained_as_that_is(parameters: int, small: bool) -> None:
    found = defaults_of("subject", "lora", KnownBase("/some/base", "sd1", parameters)).values["optim.lr"]
    assert (found.value, found.origin == TINY_MEASURED) == ((2e-3, True) if small else (1e-4, False))


def test_the_most_special_profile_counts() -> None:
    origins = {
        family: defaults_of("subject", "lora", KnownBase("base", family, 10**9)).values["optim.lr"].origin
        for family in [*FAMILIES, None, "of-a-plugin"]
    }
    told = {family: origin.partition(":")[0] for family, origin in origins.items()}
    assert told.pop("sdxl") == told.pop("sdxl-refiner") == "sdxl"
    assert (told.pop("sd3"), told.pop("flux")) == ("sd3", "flux")
    assert set(told.values()) == {"general"}
    order = [profile.name for profile in profiles()]
    assert (order[0], order[-1]) == ("general", "tiny")


def test_a_copy_of_the_tiny_base_is_known_by_its_size(tmp_path: Path) -> None:
    copy = shutil.copytree(
        ROOT / "finetune" / "tiny_base", tmp_path / "copy", ignore=shutil.ignore_patterns("*.safet*")
    )
    recipe = load_recipe("dreambooth-lora", [*NEEDED, f"base={copy}"])
    assert recipe.optim.lr == 2e-3
    assert recipe.profile.filled["optim.lr"] == TINY_MEASURED
    assert known_base(recipe.base) == KnownBase(str(copy), "sd1", 9_070_827)


# precedence: what was typed > the recipe's file > the profile > the setting's own default


@pytest.mark.parametrize(
    ("in_file", "typed", "rate", "from_profile"),
    [
        ({}, [], 2e-3, True),
        ({"lr": 3e-4}, [], 3e-4, False),
        ({"lr": 3e-4}, ["optim.lr=5e-4"], 5e-4, False),
        ({}, ["optim.lr=5e-4"], 5e-4, False),
        ({}, ["optim={lr: 5e-4}"], 5e-4, False),
        ({}, ["optim.kind=paged_adamw8bit"], 2e-3, True),  # its own kind, but AdamW's rates fit
        ({}, ["optim.kind=prodigy"], 1.0, False),  # of another kind: its own default
        ({"kind": "lion8bit"}, [], 1e-4, False),
        ({}, ["profile=none", "optim.kind=adamw"], 1e-4, False),
    ],
)
def test_the_rate_that_counts(in_file: dict[str, Any], typed: list[str], rate: float, from_profile: bool) -> None:
    raw = {"profile": "subject", "data": {"photos": "x", "class_noun": "mug"}, "method": {"kind": "lora"}}
    recipe = parse_recipe(raw | ({"optim": in_file} if in_file else {}), typed)
    assert recipe.optim.lr == pytest.approx(rate)
    assert ("optim.lr" in recipe.profile.filled) is from_profile


@pytest.mark.parametrize(
    ("typed", "key", "value"),
    [
        ("run={steps: 7}", "run.batch_size", 4),  # the others of the section stay
        ("prior.kind=none", "prior.kind", "none"),
        ("objective.weighting.gamma=3", "objective.weighting", {"kind": "min_snr", "gamma": 3.0}),
        ("objective.gamma=3", "objective.weighting", {"kind": "min_snr", "gamma": 3.0}),  # the older form
        ("objective.weighting=none", "objective.weighting", {"kind": "none"}),
        ("method.kind=full", "optim.lr", 4e-4),  # another method, another profile
        ("method.kind=oft", "method.targets", "all-linear"),
    ],
)
def test_what_is_typed_counts_more_than_the_profile(typed: str, key: str, value: Any) -> None:
    assert value_of(load_recipe("dreambooth-lora", [*NEEDED, typed]), key) == value


def test_a_rate_of_text_encoders_is_not_filled_in_without_them() -> None:
    recipe = load_recipe("dreambooth-full", [*NEEDED, "method.parts=[denoiser]"])
    assert recipe.optim.text_lr is None  # it would be refused: there are no text encoders to train
    assert load_recipe("dreambooth-full", NEEDED).optim.text_lr == 3e-5
    assert load_recipe("dreambooth-full", [*NEEDED, "optim.text_lr=1e-5"]).method.parts == [
        "denoiser",
        "text_encoders",
    ]


@pytest.mark.parametrize(
    ("typed", "dropout", "count"),
    [
        ("prior.others.count=128", 0.0, 128),  # still on, so that the empty prompt is theirs to teach
        ("prior.others={count: 128}", 0.0, 128),
        ("prior.others={}", 0.0, 256),
        ("prior.others=null", 0.25, None),  # without them it is the class images' part
        ("prior.caption_dropout=0.1", 0.1, 256),
    ],
)
def test_a_prior_of_everything_else_that_is_changed_stays_on(typed: str, dropout: float, count: int | None) -> None:
    prior = load_recipe("dreambooth-lora", [*NEEDED, typed]).prior
    assert prior.caption_dropout == dropout
    assert (prior.others and prior.others.count) == count


def test_own_settings_of_everything_else_keep_the_rest_of_the_profiles() -> None:
    prior = load_recipe("dreambooth-lora", [*NEEDED, "prior.others.count=128"]).prior
    assert (prior.others.guidance, prior.others.steps, prior.others.share) == (3.0, 12, 0.5)


def test_a_recipe_without_a_profile_keeps_its_settings_own_defaults() -> None:
    raw = {"data": {"photos": "x", "class_noun": "mug"}, "method": {"kind": "lora"}, "optim": {"kind": "adamw"}}
    recipe = parse_recipe(raw)
    assert (recipe.optim.lr, recipe.method.targets, recipe.defaults) == (1e-4, "all-linear", "")


# a base that is not here yet


def test_a_hub_id_is_settled_when_its_configs_are_here(
    tmp_path: Path, tiny_bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub" / "models--owner--never-fetched"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    recipe = load_recipe("dreambooth-lora", {"base": HUB, "optim.schedule": "linear"})
    assert not recipe.profile.settled
    assert recipe.profile.filled["optim.lr"].startswith("general: ")
    shutil.copytree(tiny_bases["flux"], cache / "snapshots" / "0123abc")
    found = settled(recipe)
    assert found.profile.settled
    assert found.profile.filled["optim.lr"].startswith("flux: ")
    assert found.optim.schedule == "linear"
    assert plain(found) == plain(recipe)  # this family's numbers are the general ones


def test_what_a_base_of_another_size_needs_replaces_only_what_nobody_gave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"base": HUB, "run.steps": 30, "objective.noise_offset": 0.1}
    recipe = load_recipe("style-lora", given)
    changed = recipe.model_copy(update={"method": recipe.method.model_copy(update={"rank": 3})})
    monkeypatch.setattr("finetune.config.load.known_base", lambda base, download: KnownBase(HUB, "sd1", 8_000_000))
    found = settled(changed)
    assert (found.optim.lr, found.objective.weighting.kind, found.prior.count) == (2e-3, "min_snr", 40)
    assert (found.run.steps, found.objective.noise_offset, found.method.rank) == (30, 0.1, 3)
    assert found.optim.warmup == 3
    assert "method.rank" not in found.profile.filled
    assert found.profile.filled["method.targets"].startswith("tiny: ")


def test_a_base_that_can_not_be_fetched_is_refused_where_it_is_loaded() -> None:
    recipe = load_recipe("dreambooth-lora", {"base": "./nowhere"})
    found = settled(recipe, download=True)
    assert found.profile.settled  # so that a run of it can't change later
    assert plain(found) == plain(recipe)


@pytest.mark.parametrize("odd", ["/nowhere/at/all", "a/b/c", "~/nothing", "no such base", "a//b"])
def test_an_odd_base_is_left_to_those_who_open_it(odd: str) -> None:
    recipe = load_recipe("dreambooth-lora", {"base": odd})
    assert not known_base(recipe.base).is_known
    assert not recipe.profile.settled


@pytest.mark.parametrize("blank", ["", "x\0y"])
def test_a_blank_base_is_refused_as_before(blank: str) -> None:
    with pytest.raises(BadInput, match="it is blank"):
        load_recipe("dreambooth-lora", {"base": blank})


# a run's own recipe


def test_a_runs_recipe_is_read_back_as_it_is(tmp_path: Path) -> None:
    recipe = load_recipe("dreambooth-lora", NEEDED)
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    assert read_recipe(file) == recipe
    assert load_recipe(file) == recipe
    longer = load_recipe(file, ["run.steps=600"])
    assert longer.run.steps == 600
    assert "run.steps" not in longer.profile.filled
    assert longer.profile.filled["optim.lr"] == TINY_MEASURED
    assert changed_recipe(recipe, ["export.rank=null"]).profile == recipe.profile


def test_on_another_base_a_runs_recipe_keeps_its_values_and_claims_no_source(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(load_recipe("dreambooth-lora", NEEDED)), encoding="utf-8")
    moved = load_recipe(file, {"base": HUB})
    assert moved.optim.lr == 2e-3
    assert moved.defaults == ""


def test_an_older_runs_recipe_gets_no_defaults(tmp_path: Path) -> None:
    values = load_recipe("dreambooth-lora", [*NEEDED, "optim.lr=1e-4"]).model_dump(mode="json")
    del values["profile"]
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert read_recipe(file).optim.lr == 1e-4
    assert read_recipe(file).defaults == ""


# who is blamed


@pytest.mark.parametrize("base", ["tiny", HUB])
@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["profile=sytle"], "profile.purpose is 'sytle': did you mean 'style'?"),
        (["optim.warmup=50", "run.steps=20"], "optim.warmup is 50 but run.steps is 20"),
        (["optim.lr=0"], "optim.lr is 0: give more than 0"),
        (["method.kind=lroa"], "there is no method.kind 'lroa'; did you mean 'lora'?"),
        (["prior.cuont=3"], "there is no setting 'prior.cuont'; did you mean 'prior.count'?"),
        (["run.steps=many"], "run.steps is 'many'"),
        (["optim=5"], "optim is 5"),
        (["prior.count=0"], "prior.count is 0"),
    ],
)
def test_the_blame_is_on_what_was_typed(typed: list[str], said: str, base: str) -> None:
    with pytest.raises(BadInput) as caught:
        load_recipe("style-lora", [f"base={base}", *typed])
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize("base", ["tiny", HUB])
def test_a_warm_up_that_nobody_typed_fits_the_steps_that_were(base: str) -> None:
    recipe = load_recipe("style-lora", [f"base={base}", "run.steps=20"])
    assert recipe.optim.warmup == 2
    assert recipe.profile.filled["optim.warmup"].endswith("; shortened from 50 to a tenth of run.steps")
    assert load_recipe("style-lora", [f"base={base}", "run.steps=500"]).optim.warmup == 50
    assert load_recipe("style-lora", [f"base={base}", "run.steps=60", "optim.warmup=50"]).optim.warmup == 50


def test_a_warm_up_of_a_recipes_own_file_is_shortened_only_where_it_would_be_refused() -> None:
    raw = {"data": {"photos": "x", "class_noun": "mug"}, "method": {"kind": "lora"}, "run": {"steps": 800}}
    raw |= {"optim": {"kind": "adamw", "warmup": 100}}
    assert parse_recipe(raw, ["run.steps=100"]).optim.warmup == 100
    recipe = parse_recipe(raw, ["run.steps=90"])
    assert recipe.optim.warmup == 9
    assert recipe.defaults == "optim.warmup 9 (the recipe; shortened from 100 to a tenth of run.steps)"
    with pytest.raises(BadInput, match=r"^the recipe: optim\.warmup is 100 but run\.steps is 50"):
        parse_recipe(raw | {"run": {"steps": 50}})


# it is shown


def test_the_defaults_in_words() -> None:
    recipe = load_recipe("dreambooth-full", NEEDED)
    first = rows(recipe.profile.filled, recipe.model_dump(mode="json"))[0]
    assert first.startswith("optim.kind adamw, optim.lr 0.0004, optim.text_lr 3e-05, optim.schedule cosine, ")
    assert first.endswith(f"method.parts [denoiser, text_encoders], objective.weighting min_snr ({TINY_MEASURED})")


def test_the_plan_and_the_page_show_where_defaults_come_from(tiny_bases: dict[str, Path], photos: Path) -> None:
    recipe = load_recipe("dreambooth-lora", [f"data.photos={photos}", "data.class_noun=mug", "run.steps=3"])
    recipe = recipe.model_copy(update={"base": recipe.base.model_copy(update={"source": str(tiny_bases["sd1"])})})
    made = plan(check_run(recipe))
    for shown in (plan_rows(made), shared_rows(made), report(recipe)):
        assert shown["defaults"] == recipe.defaults
    assert "method.targets conv, method.rank 16, prior.kind class_images" in recipe.defaults
    assert "run.steps" not in recipe.defaults


def test_a_default_that_has_settings_of_its_own_is_shown_as_it_is_typed() -> None:
    recipe = load_recipe("dreambooth-lora", [*NEEDED, "base=tiny"])
    shown = next(text for text in recipe.defaults.split("prior.others ")[1:]).partition("}")[0] + "}"
    again = load_recipe("dreambooth-lora", [*NEEDED, "base=tiny", f"prior.others={shown}"])
    assert again.prior.others == recipe.prior.others is not None
