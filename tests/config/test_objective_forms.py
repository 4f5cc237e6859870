"""`objective:` in its older form, where each setting was a key of its own, and in today's: the same recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.config.load import dump_recipe, load_recipe, parse_recipe
from finetune.config.recipe import json_schema
from finetune.core.errors import BadInput
from finetune.objectives.densities import Auto, LogitNormal, Mode
from finetune.objectives.loss import Huber
from finetune.objectives.settings import ObjectiveSettings
from finetune.objectives.weightings.debiased import Debiased
from finetune.objectives.weightings.min_snr import MinSNR
from finetune.objectives.weightings.p2 import P2
from finetune.runs.folder import RunFolder

MINIMAL = {"data": {"photos": "photos", "class_noun": "dog"}, "method": {"kind": "lora"}, "optim": {"kind": "adamw"}}

# (the older form, today's, what it is)
FORMS: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ({"weighting": "min_snr"}, {"weighting": {"kind": "min_snr"}}, {"weighting": MinSNR(gamma=5.0)}),
    (
        {"weighting": "min_snr", "gamma": 1},
        {"weighting": {"kind": "min_snr", "gamma": 1}},
        {"weighting": MinSNR(gamma=1.0)},
    ),
    ({"weighting": "p2", "gamma": None}, {"weighting": {"kind": "p2"}}, {"weighting": P2(gamma=1.0)}),
    ({"weighting": "debiased"}, {"weighting": {"kind": "debiased"}}, {"weighting": Debiased()}),
    (
        {"density": "logit_normal", "logit_mean": 0.5, "logit_std": 2},
        {"density": {"kind": "logit_normal", "mean": 0.5, "std": 2}},
        {"density": LogitNormal(mean=0.5, std=2.0)},
    ),
    ({"logit_mean": 0.5}, {"density": {"kind": "auto", "mean": 0.5}}, {"density": Auto(mean=0.5)}),
    ({"density": "mode", "mode_scale": 0}, {"density": {"kind": "mode", "scale": 0}}, {"density": Mode(scale=0.0)}),
    ({"loss": "huber", "huber_c": 0.5}, {"loss": {"kind": "huber", "c": 0.5}}, {"loss": Huber(c=0.5)}),
]

# what a run of demo wrote down before: every key
DUMPED = {
    "prediction": "auto", "timesteps": "uniform", "density": "auto", "logit_mean": 0.0, "logit_std": 1.0,
    "mode_scale": 1.29, "shift": "auto", "weighting": "min_snr", "gamma": None, "loss": "l2", "huber_c": 0.1,
    "noise_offset": 0.0, "input_perturbation": 0.0,
}  # fmt: skip


def objective(sections: dict[str, Any], *overrides: str) -> ObjectiveSettings:
    return parse_recipe(MINIMAL | {"objective": sections}, overrides).objective


def refusal(sections: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(BadInput) as caught:
        objective(sections, *overrides)
    said = str(caught.value)
    assert "\n" not in said
    return said


@pytest.mark.parametrize(("older", "form", "wanted"), FORMS)
def test_both_forms_are_the_same_settings(older: dict, form: dict, wanted: dict) -> None:
    settings = ObjectiveSettings(**wanted)
    assert objective(older) == objective(form) == settings
    assert ObjectiveSettings(**older) == ObjectiveSettings(**form) == settings
    as_overrides = [f"objective.{key}={'null' if value is None else value}" for key, value in older.items()]
    assert objective({}, *as_overrides) == objective({}, *reversed(as_overrides)) == settings


@pytest.mark.parametrize(("older", "form", "wanted"), FORMS)
def test_todays_form_is_written_and_read_again(older: dict, form: dict, wanted: dict) -> None:
    recipe = parse_recipe(MINIMAL | {"objective": older})
    written = yaml.safe_load(dump_recipe(recipe))
    for part in wanted:
        assert form[part].items() <= written["objective"][part].items()
    assert parse_recipe(written) == recipe


def test_parts_of_a_kind_are_set_by_overrides() -> None:
    assert objective({}, "objective.weighting.kind=p2", "objective.weighting.gamma=2").weighting == P2(gamma=2.0)
    assert objective({"weighting": "min_snr"}, "objective.weighting.gamma=2").weighting == MinSNR(gamma=2.0)
    assert objective({}, "objective.weighting={kind: p2, gamma: 2}").weighting == P2(gamma=2.0)
    assert objective({"weighting": {"kind": "min_snr", "gamma": 2}}, "objective.weighting.kind=p2").weighting == P2()


def test_an_override_wins_over_a_recipe_of_the_other_form() -> None:
    assert objective({"weighting": {"kind": "min_snr", "gamma": 2}}, "objective.gamma=3").weighting == MinSNR(gamma=3)
    assert objective({"weighting": {"kind": "min_snr", "gamma": 2}}, "objective.gamma=null").weighting == MinSNR()
    assert objective({"weighting": "min_snr", "gamma": 2}, "objective.weighting.gamma=3").weighting == MinSNR(gamma=3)


def test_overrides_leave_the_callers_dictionary_as_it_was() -> None:
    sections = {"weighting": {"kind": "min_snr", "gamma": 2}}
    objective(sections, "objective.weighting.gamma=3")
    assert sections == {"weighting": {"kind": "min_snr", "gamma": 2}}


@pytest.mark.parametrize(
    ("sections", "overrides", "said"),
    [
        ({"weighting": {"kind": "debiased", "gamma": 3}}, [], "there is no setting 'objective.weighting.gamma'"),
        ({"weighting": {"kind": "min_snr", "gama": 3}}, [], "did you mean 'objective.weighting.gamma'?"),
        ({"weighting": {"kind": "min_snr", "gamma": -1}}, [], "objective.weighting.gamma is -1: give more than 0"),
        ({"weighting": "min_snr", "gamma": -1}, [], "objective.weighting.gamma is -1: give more than 0"),
        ({"weighting": "min_sn"}, [], "there is no objective.weighting.kind 'min_sn'; did you mean 'min_snr'?"),
        ({"weighting": "min_sn", "gamma": 3}, [], "there is no objective.weighting.kind 'min_sn'; did you mean 'min"),
        ({"loss": "absolute"}, [], "there is no objective.loss.kind 'absolute'; known are l2, huber"),
        ({"weighting": {"gamma": 3}}, [], "objective.weighting.kind is missing: give one of none, "),
        ({}, ["objective.weighting.gamma=3"], "objective.weighting.kind is missing"),
        ({"weighting": {"kind": "p2", "gamma": 1}, "gamma": 2}, [], "is the older form of objective.weighting.gamma"),
        (
            {"density": {"kind": "mode", "scale": 1}, "mode_scale": 1.29},
            [],
            "both are given: leave objective.mode_scale",
        ),
        ({"weighting": {"kind": ["p2"]}, "gamma": 2}, [], "objective"),
        ({"weighting": 3, "gamma": 2}, [], "objective"),
        ({"gamma": 3}, [], "the recipe: objective.gamma is 3 but objective.weighting is none, so it has no effect"),
        ({"logit_meen": 3}, [], "there is no setting 'objective.logit_meen'"),
        ({"shift.by": 3}, [], "there is no setting 'objective.shift.by'"),
        ({}, ["objective.shift.by=3"], "there is no setting 'objective.shift.by'"),
    ],
)
def test_what_is_wrong_is_told_by_name(sections: dict, overrides: list[str], said: str) -> None:
    assert said in refusal(sections, *overrides)


def run_of(tmp_path: Path, first_line: str, **objective: Any) -> RunFolder:
    """A run folder that a version before this one wrote."""
    text = yaml.safe_dump(MINIMAL | {"objective": DUMPED | objective}, sort_keys=False)
    (tmp_path / "recipe.yaml").write_text(first_line + text, encoding="utf-8")
    return RunFolder(tmp_path)


@pytest.mark.parametrize("first_line", ["# schema: 1\n", "# schema: 0\n", ""])
def test_an_older_run_is_read_and_its_recipe_can_be_trained_again(first_line: str, tmp_path: Path) -> None:
    folder = run_of(tmp_path, first_line, gamma=3.0)
    wanted = parse_recipe(MINIMAL | {"objective": {"weighting": {"kind": "min_snr", "gamma": 3}}})
    assert folder.recipe == load_recipe(tmp_path / "recipe.yaml") == wanted
    folder.check(wanted)  # a resume finds no changed key


def test_an_older_run_may_hold_a_key_that_had_no_effect(tmp_path: Path) -> None:
    """`parse_recipe` once accepted it. The run opens as what it was; a new one of the same recipe is refused."""
    folder = run_of(tmp_path, "# schema: 1\n", huber_c=0.5, mode_scale=0.3, logit_mean=1.0)
    assert folder.recipe == parse_recipe(
        MINIMAL | {"objective": {"weighting": "min_snr", "density": {"kind": "auto", "mean": 1}}}
    )
    with pytest.raises(BadInput, match=r"objective\.mode_scale is 0\.3 but objective\.density is auto"):
        load_recipe(tmp_path / "recipe.yaml")


def test_a_recipe_of_a_later_version_is_refused_wherever_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("# schema: 3\n: [a form that is not known", encoding="utf-8")
    with pytest.raises(BadInput, match=r"mine\.yaml has schema 3, and finetune .* reads schemas up to 2"):
        load_recipe(file)


def test_the_schema_for_editors_shows_the_kinds_and_their_settings() -> None:
    schema = json_schema()
    weighting = schema["$defs"]["ObjectiveSettings"]["properties"]["weighting"]
    names, union = weighting["anyOf"]
    assert set(names["enum"]) == set(union["discriminator"]["mapping"]) == {"none", "min_snr", "debiased", "p2"}
    own = {kind: set(schema["$defs"][place.split("/")[-1]]["properties"]) - {"kind"} for kind, place in
           union["discriminator"]["mapping"].items()}  # fmt: skip
    assert own == {"none": set(), "min_snr": {"gamma"}, "debiased": set(), "p2": {"gamma"}}
    assert all(schema["$defs"][name]["additionalProperties"] is False for name in ("MinSNR", "Huber", "LogitNormal"))
