"""Reads recipes from YAML files, shipped names or dictionaries, with overrides, and writes them."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from finetune.config.effect import without_effect
from finetune.config.overrides import Overrides, overridden, pairs, typed_override
from finetune.config.placeholders import borrowed_words
from finetune.config.profiles import (
    NO_PROFILE,
    WARMUP,
    Default,
    at,
    defaults_of,
    fill_defaults,
    fitting_warmup,
    without,
)
from finetune.config.recipe import Recipe
from finetune.config.recipes import examples, find, folder
from finetune.config.sections import is_in
from finetune.config.wrong_values import refuse_truths, what_is_wrong
from finetune.core.errors import BadInput
from finetune.core.reading import parse_yaml, read_utf8
from finetune.core.records import Values, check_schema, migrated
from finetune.families.known import KnownBase, known_base
from finetune.families.settings import Base
from finetune.objectives import older
from finetune.training.settings import Run

SCHEMA = 2  # schema 1 had the older form of `objective:`; schema 0 had the same keys as 1 but no number in the file
SCHEMA_LINE = "# schema: "  # in the first line, a comment: readable even if the rest has an unknown form

MAX_RECIPE = 1_000_000  # bytes


def load_recipe(source: str | Path, overrides: Overrides = ()) -> Recipe:
    """Reads a shipped recipe by name, or a YAML file, and applies `section.key=value` overrides in order.

    Args:
        overrides: `["run.steps=400"]`, as on the command line, or `{"run.steps": 400}`.

    Returns:
        The checked recipe.

    Raises:
        BadInput: no such recipe, not YAML, an unknown key (the message suggests the nearest known one), a bad value,
            or a setting that has no effect with the other settings.
    """
    if not isinstance(source, str | Path):
        raise BadInput(f"{reprlib.repr(source)} is no recipe: give the name of a shipped one, or a YAML file's path")
    path = find(str(source))
    raw, shipped = _read(path), path.parent == folder()
    given = pairs(overrides)
    recipe = parse_recipe(_with_examples(raw) if shipped else raw, given, where=str(path))
    names = [override.partition("=")[0] if isinstance(override, str) else override[0] for override in given]
    return recipe.read_with(borrowed_words(recipe, names)) if shipped else recipe


def _with_examples(raw: dict[str, Any]) -> dict[str, Any]:
    """A shipped recipe whose photos are the examples, which come with the package, in whatever folder one is."""
    photos = Path(raw["data"]["photos"])
    if photos.parts[0] != "examples" or photos.is_dir():
        return raw
    return raw | {"data": raw["data"] | {"photos": str(examples() / Path(*photos.parts[1:]))}}


def read_recipe(path: Path) -> Recipe:
    """Reads a run's own recipe file and returns the checked recipe.

    Settings without effect are accepted here: an earlier version may have allowed them when the run began.

    Raises:
        BadInput: as `load_recipe`, except for settings without effect.
    """
    raw = _read(path)
    if isinstance(raw, dict):
        raw = migrated(raw | {"schema": _schema_of(path) or 0}, path, SCHEMA, [_from_0, _from_1])
        del raw["schema"]
    return _parse(raw, (), str(path))[0]


def parse_run_recipe(values: Any, where: str) -> Recipe:
    """Makes the recipe of a run from what another of its processes read: settings without effect are accepted.

    Raises:
        BadInput: an unknown key or a bad value.
    """
    return _parse(values, (), where)[0]


def _read(path: Path) -> Any:
    """The content of a recipe file as plain data. Raises BadInput if it is not YAML, or has a later schema."""
    schema = _schema_of(path)  # before parsing: the rest of a later version's recipe may not be readable
    if schema is not None:
        check_schema(schema, path, SCHEMA)
    raw = parse_yaml(read_utf8(path, MAX_RECIPE), str(path), _Loader)
    return raw if raw is not None else {}


def _schema_of(path: Path) -> int | str | None:
    """The schema number in a recipe's first line, or the text in its place; None if it has no such line."""
    with path.open(encoding="utf-8", errors="replace") as opened:
        first = opened.readline(1_000).strip()
    if not first.startswith(SCHEMA_LINE):
        return None
    number = first.removeprefix(SCHEMA_LINE)
    return int(number) if number.isdecimal() else number


def _from_0(values: Values) -> Values:
    return values  # the same keys


def _from_1(values: Values) -> Values:
    """In schema 1 every setting of `objective:` was a key of its own, and was accepted even if it had no effect."""
    objective = values.get("objective")
    if not isinstance(objective, dict):
        return values
    return values | {"objective": older.without_useless(objective)}


class _Loader(yaml.SafeLoader):
    """Loads plain data only. A repeated key is an error, because YAML would silently use the last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} appears twice", node.start_mark)
        return super().construct_mapping(node, deep)


def parse_recipe(raw: Any, overrides: Overrides = (), where: str = "the recipe") -> Recipe:
    """Makes a recipe from plain data (nested dictionaries), such as YAML or JSON gives.

    `where` names the source in messages. If the recipe has a profile and its base is on this disk, the defaults are
    those for this base; of a hub id that is not, only once it is fetched (`settled`).

    Returns:
        The checked recipe.

    Raises:
        BadInput: an unknown key, a bad value, or a setting that has no effect with the other settings.
    """
    recipe, given = _parse(raw, overrides, where)
    if recipe.profile.waits:
        base = known_base(recipe.base)
        recipe, given = _parse(raw, overrides, where, base) if base.is_known else (recipe, given)
    for useless in without_effect(recipe):
        raise BadInput(useless if any(key in useless for key in given) else f"{where}: {useless}")
    return recipe


def settled(recipe: Recipe, download: bool = False) -> Recipe:
    """Returns the recipe with the defaults of its profile for the base that it names. What was given stays.

    Args:
        download: also read the configs of a hub id that was not fetched before. What is not known then counts as
            settled with the defaults for all bases, as a run must not change later.

    Returns:
        The recipe, unchanged if it has no profile, or was settled before.

    Raises:
        BadInput: a default contradicts what was given.
    """
    profile = recipe.profile
    base = known_base(recipe.base, download) if profile.waits else None
    if base is None or not (base.is_known or download):
        return recipe
    if not base.is_known:
        return recipe.model_copy(update={"profile": profile.model_copy(update={"settled": True})})
    before = defaults_of(profile.purpose or "", recipe.method.kind, KnownBase(recipe.base.source)).values
    found, _ = _parse(_unfilled(recipe, before), (), "the recipe", base)
    kept = {key: origin for key, origin in profile.filled.items() if key not in before}
    whole = found.profile.model_copy(update={"filled": found.profile.filled | kept})
    return found.model_copy(update={"profile": whole})


def _unfilled(recipe: Recipe, defaults: Mapping[str, Default]) -> dict[str, Any]:
    """Its plain data without the `defaults` that were filled in. One that was changed since counts as given."""
    values = recipe.model_dump(mode="json", exclude_unset=True)
    for key in (key for key in recipe.profile.filled if key in defaults):
        wanted = defaults[key].value
        shorter = fitting_warmup(wanted, recipe.run.steps) if key == WARMUP else wanted
        if at(values, key) in (wanted, shorter):
            without(values, key)
    return values | {"profile": recipe.profile.purpose}


def changed_recipe(recipe: Recipe, overrides: Overrides, where: str = "the options") -> Recipe:
    """Returns a copy of a run's recipe with overrides applied. Settings that already had no effect are accepted.

    Raises:
        BadInput: an override is not valid, or has no effect.
    """
    changed, _ = _parse(recipe.model_dump(mode="json"), overrides, where)
    before = without_effect(recipe)
    for useless in without_effect(changed):
        if useless not in before:
            raise BadInput(f"{where}: {useless}")
    return changed


def _parse(
    raw: Any, overrides: Overrides, where: str, base: KnownBase | None = None
) -> tuple[Recipe, Mapping[str, str]]:
    """The recipe, and the keys that were overridden, with their values as they were typed. `base`: what is known of it
    besides its name."""
    if not isinstance(raw, dict):
        raise BadInput(f"{where} holds a {type(raw).__name__} instead of sections such as 'data:': correct it")
    typed = [typed_override(override) for override in pairs(overrides)]
    final = overridden(raw, typed)
    known = base or KnownBase(_source(final))
    start, defaults = fill_defaults(raw, final, known)
    values = overridden(start, typed) if defaults else final
    given = {key: text for key, _, text in typed}
    refuse_truths(values, where, given)
    _record(values, defaults, given, known.is_known)
    try:
        return Recipe.model_validate(values), given
    except ValidationError as error:
        raise BadInput(what_is_wrong(error, where, given)) from error


def _source(values: Mapping[str, Any]) -> str:
    """The base's name in a recipe's plain data."""
    base = values.get("base")
    source = base.get("source") if isinstance(base, dict) else base
    return source if isinstance(source, str) else Base().source


def _record(values: dict[str, Any], defaults: Mapping[str, Default], given: Iterable[str], settled: bool) -> None:
    """Writes into `profile:` which values come from where, and shortens a warm-up that nobody typed.

    A run's own recipe says this already, unless another base is asked for: then its values count as given.
    """
    profile = values.get("profile")
    if isinstance(profile, dict) and "settled" in profile:
        known = profile.get("filled")
        stays = not any(is_in(name, "base") for name in given)
        origins = dict(known) if stays and isinstance(known, dict) else {}
        profile = profile if stays else {}
    else:
        origins = {key: default.origin for key, default in defaults.items() if at(values, key) == default.value}
        profile = {"purpose": None if profile == NO_PROFILE else profile} if isinstance(profile, str) else profile
        profile = profile | {"settled": settled} if isinstance(profile, dict) and profile.get("purpose") else profile
    filled = {key: origin for key, origin in origins.items() if not any(is_in(key, name) for name in given)}
    _shorten_warmup(values, filled, given)
    if isinstance(profile, dict) or filled:
        values["profile"] = (profile if isinstance(profile, dict) else {}) | {"filled": filled}


def _shorten_warmup(values: dict[str, Any], filled: dict[str, str], given: Iterable[str]) -> None:
    """Shortens a warm-up that nobody typed for a run of few steps: always one of a profile, and a recipe's own if it
    would be longer than the steps that were typed."""
    warmup, steps = at(values, WARMUP), at(values, "run.steps", Run().steps)
    if any(is_in(WARMUP, name) for name in given) or type(warmup) is not int or type(steps) is not int:
        return
    typed = any(is_in("run.steps", name) for name in given)
    fits = fitting_warmup(warmup, steps)
    if fits < warmup and (WARMUP in filled or (typed and warmup > steps)):
        values["optim"]["warmup"] = fits
        filled[WARMUP] = f"{filled.get(WARMUP, 'the recipe')}; shortened from {warmup} to a tenth of run.steps"


def dump_recipe(recipe: Recipe) -> str:
    """Returns the resolved recipe as YAML text, with every key, in the order of the sections."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
