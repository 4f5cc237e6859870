"""Recipes read from YAML, names or dictionaries, with overrides; and written."""

from __future__ import annotations

import difflib
import reprlib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from finetune.config.effect import without_effect
from finetune.config.recipe import Recipe
from finetune.config.recipes import find
from finetune.core.errors import BadInput
from finetune.core.reading import parse_yaml, read_utf8
from finetune.core.settings import Settings

MAX_RECIPE = 1_000_000  # bytes


def load_recipe(source: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """A shipped recipe's name or a YAML file, with `section.key=value` overrides, as a checked `Recipe`.

    Raises:
        BadInput: no such recipe, not YAML, an unknown key (the nearest known one is named), a bad value, or a setting
            that has no effect beside the others.
    """
    path = find(str(source))
    recipe = read_recipe(path, overrides)
    useless = without_effect(recipe)
    if useless is not None:
        raise BadInput(f"{path}: {useless}")
    return recipe


def read_recipe(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """A recipe file as a checked `Recipe`: a run's own too, where a setting without effect may stand.

    Raises:
        BadInput: as `load_recipe`, but for settings without effect.
    """
    raw = parse_yaml(read_utf8(path, MAX_RECIPE), str(path), _Loader)
    return parse_recipe(raw if raw is not None else {}, overrides, where=str(path))


class _Loader(yaml.SafeLoader):
    """Plain data only, and a key that stands twice is an error: YAML would take the last one in silence."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def parse_recipe(raw: Any, overrides: list[str] | tuple[str, ...] = (), where: str = "the recipe") -> Recipe:
    """A recipe from plain data (nested dictionaries), as YAML or JSON gives it."""
    if not isinstance(raw, dict):
        raise BadInput(f"{where} holds a {type(raw).__name__} where sections such as 'data:' should be: mend it")
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in raw.items()}
    for override in overrides:
        _override(values, override)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise BadInput(_sentence(error, where)) from error


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every key, in the order of the sections."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    section, _, name = key.partition(".")
    if not equals or not section:
        raise BadInput(f"{override!r} is no setting: write section.key=value, such as run.steps=400")
    value = parse_yaml(text, f"the value of {reprlib.repr(override)}") if text else ""
    if not name:
        values[section] = value
        return
    inside = values.setdefault(section, {})
    if not isinstance(inside, dict):
        inside = values[section] = {"source": inside} if section == "base" else {"kind": inside}
    if name == "kind" and inside.get("kind") != value:
        inside.clear()  # another kind has other keys: those of the recipe's kind do not carry over
    inside[name] = value


def _sentence(error: ValidationError, where: str) -> str:
    """pydantic's first complaint (an unknown key before a missing one, which it may be) as one sentence that names the
    key, the value and what to do."""
    complaints = error.errors(include_url=False)
    first = next((item for item in complaints if item["type"] == "extra_forbidden"), complaints[0])
    location = [str(part) for part in first["loc"]]
    known, shown = _keys_at(location[:-1])
    key = ".".join([*shown, *location[-1:]])
    if first["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*shown, nearest[0]])!r}?" if nearest else f"known are {', '.join(known)}"
        return f"{where}: there is no setting {key!r}; {hint}"
    if first["type"] == "missing":
        how = "give it in the recipe" + ("" if any(part.isdigit() for part in location) else f" or as {key}=VALUE")
        return f"{where}: {key!r} is missing: {how}"
    message = first["msg"].removeprefix("Value error, ")
    value = "" if isinstance(first["input"], dict) else f" is {reprlib.repr(first['input'])[:80]}"
    subject = f"{key}{value}: " if key else ""  # none where sections contradict each other
    return f"{where}: {subject}{message[0].lower()}{message[1:]}"


def _keys_at(location: list[str]) -> tuple[list[str], list[str]]:
    """The known keys of the section at a pydantic location, and that location without the union tags."""
    model: Any = Recipe
    shown: list[str] = []
    kinds: dict[str, type[Settings]] = {}
    for part in location:
        if part in kinds:
            model, kinds = kinds[part], {}
            continue
        options = _options(model, part)
        model = options[0] if options else model
        kinds = {option.model_fields["kind"].default: option for option in options} if len(options) > 1 else {}
        shown.append(part)
    return list(model.model_fields), shown


def _options(model: Any, name: str) -> list[type[Settings]]:
    """The section classes that `model.name` may hold."""
    field = model.model_fields.get(name)
    if field is None:
        return []
    candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
    return [c for c in candidates if isinstance(c, type) and issubclass(c, Settings)]
