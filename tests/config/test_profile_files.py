"""The files of profiles: every method and family has its numbers, each with a source, and the docs have them too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from test_profiles import FOR_ANY, HUB, ROOT

from finetune.config import recipes
from finetune.config.load import load_recipe, parse_recipe
from finetune.config.profiles import Profile, defaults_of, profiles
from finetune.core.errors import BadInput
from finetune.families.known import KnownBase
from finetune.families.registry import FAMILIES
from finetune.methods.registry import METHODS

ASKED = ("optim.lr", "run.steps", "method.rank", "method.targets", "prior.kind")
OF_SD = KnownBase("base", "sd1", 860_000_000)

# every value has a source


@pytest.mark.parametrize("purpose", ["subject", "style"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_has_its_numbers_on_every_family(method: str, purpose: str) -> None:
    fields = METHODS[method].model_fields
    wanted = {key for key in ASKED if not key.startswith("method.") or key.partition(".")[2] in fields}
    for base in [KnownBase("tiny"), *(KnownBase("x", family, 10**9) for family in FAMILIES)]:
        found = defaults_of(purpose, method, base).values
        assert found.keys() >= wanted
        assert all(default.origin.partition(": ")[2] for default in found.values())


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_names_its_base_or_has_a_source_for_each_number(name: str, tiny_bases: dict[str, Path]) -> None:
    raw = yaml.safe_load(recipes.find(name).read_text(encoding="utf-8"))
    if "profile" not in raw:
        assert raw["base"]
        assert raw["optim"]["lr"]
        assert raw["run"]["steps"]
        return
    for base in ("tiny", HUB, *map(str, tiny_bases.values())):
        recipe = load_recipe(name, {"base": base})
        for key in ASKED:
            section, part = key.split(".")
            if part in type(getattr(recipe, section)).model_fields:
                assert key in recipe.profile.filled or part in raw[section], (base, key)


def test_a_source_is_a_page_or_a_rule() -> None:
    for profile in profiles():
        for text in profile.sources.values():
            assert text.startswith(
                ("diffusers'", "ai-toolkit's", "the ", "rule: ", "measured, docs/", "measured once, on the mug: ")
            )
        used = {source for entry in profile.entries for _, source in entry.settings.values()}
        assert used == set(profile.sources)


# profile files


def unknown_settings(profile: Profile) -> list[str]:
    """The settings of a profile that no recipe of its methods has, or that another entry gives too."""
    found = []
    for number, entry in enumerate(profile.entries):
        for method in entry.methods:
            for key in entry.settings:
                twice = any(
                    key in other.settings and method in other.methods and set(other.purposes) & set(entry.purposes)
                    for other in profile.entries[:number]
                )
                if twice or not known(key, method, profile, entry.purposes[0]):
                    found.append(f"{method}: {key}")
    return found


def known(key: str, method: str, profile: Profile, purpose: str) -> bool:
    """Whether a recipe of this method takes the setting: the recipe itself is asked."""
    kinds = {f"{section}.kind" for section in ("optim", "prior")}
    own = {
        name: value
        for entry in profile.entries
        if method in entry.methods and purpose in entry.purposes
        for name, (value, _) in entry.settings.items()
        if name in kinds or name == key or name == "method.parts"
    }
    raw = {"data": {"photos": "x", "class_noun": "mug"}, "method": {"kind": method}, "optim": {"kind": "adamw"}}
    try:
        parse_recipe(raw, own)
    except BadInput as fault:
        return "there is no setting" not in str(fault)
    return True


@pytest.mark.parametrize("profile", profiles(), ids=lambda profile: profile.name)
def test_a_profile_has_settings_that_its_recipes_know(profile: Profile) -> None:
    assert unknown_settings(profile) == []
    assert {method for entry in profile.entries for method in entry.methods} <= set(METHODS)
    assert set(profile.bases.families) <= set(FAMILIES)


ODD = {
    "name": "odd",
    "bases": {},
    "sources": {"a": "rule: b"},
    "entries": [{"purposes": ["subject"], "methods": ["lora"], "settings": {"optim.lr": [1e-3, "a"]}}],
}


@pytest.mark.parametrize("key", ["optim.rate", "run.stepps", "method.rnk"])
def test_an_unknown_setting_in_a_profile_is_found(key: str) -> None:
    assert unknown_settings(Profile.model_validate(ODD)) == []
    odd = [ODD["entries"][0] | {"settings": {key: [1, "a"]}}]
    assert unknown_settings(Profile.model_validate(ODD | {"entries": odd})) == [f"lora: {key}"]


@pytest.mark.parametrize(
    "change",
    [{"base": {}}, {"bases": {"family": ["sd1"]}}, {"sources": {}}, {"entries": [{"purposes": ["x"]}]}],
)
def test_a_profile_of_another_form_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Profile.model_validate(ODD | change)


# the docs


def table() -> list[str]:
    """The rows of docs/recipes.md: what the recipes for any base take on which base."""
    bases = {
        "`tiny`, and its size": KnownBase("tiny"),
        "SD 1.x, SD 2.x, others": OF_SD,
        "SDXL": KnownBase("x", "sdxl", 10**9),
        "SD3, SD3.5": KnownBase("x", "sd3", 10**9),
        "Flux.1": KnownBase("x", "flux", 10**10),
    }
    lines = []
    for name in FOR_ANY:
        recipe = load_recipe(name)
        for title, base in bases.items():
            found = defaults_of(recipe.profile.purpose, recipe.method.kind, base).values
            cells = [found[key].value if key in found else "" for key in (*ASKED, "prior.count")]
            numbers = " | ".join(f"{cell:g}" if isinstance(cell, float) else str(cell) for cell in cells[:4])
            prior = f"{cells[4]} {cells[5]}".strip()
            lines.append(
                f"| `{name}` | {title} | {numbers} | {prior} | {found['optim.lr'].origin.partition(': ')[2]} |"
            )
    return lines


def test_docs_have_the_table() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    missing = [line for line in table() if line not in text]
    assert missing == [], "\n".join(["docs/recipes.md lacks:", *missing])
