"""Reads recipes from YAML files, shipped names or dictionaries, with overrides, and writes them."""

from __future__ import annotations

import copy
import difflib
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from finetune.config.effect import without_effect
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
from finetune.core.complaints import what_to_do
from finetune.core.errors import BadInput
from finetune.core.reading import parse_yaml, read_utf8
from finetune.core.records import Values, check_schema, migrated
from finetune.core.settings import Settings
from finetune.families.known import KnownBase, known_base
from finetune.families.settings import Base
from finetune.objectives import older
from finetune.training.settings import Run

SCHEMA = 2  # schema 1 had the older form of `objective:`; schema 0 had the same keys as 1 but no number in the file
SCHEMA_LINE = "# schema: "  # in the first line, a comment: readable even if the rest has an unknown form

MAX_RECIPE = 1_000_000  # bytes

# "section.key=value" as a person types it; or a key and a value, which is taken as it is
Overrides = Sequence[str | tuple[str, Any]] | Mapping[str, Any]


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
    raw = _read(path)
    return parse_recipe(_with_examples(raw) if path.parent == folder() else raw, overrides, where=str(path))


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
    """The recipe with the defaults of its profile for the base that it names. What was given stays.

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
    values = recipe.model_dump(mode="json", exclude_unset=True)
    before = defaults_of(profile.purpose or "", recipe.method.kind, KnownBase(recipe.base.source)).values
    for key in profile.filled:
        wanted = before[key].value if key in before else None
        shorter = fitting_warmup(wanted, recipe.run.steps) if key == WARMUP and wanted else wanted
        if key in before and at(values, key) in (wanted, shorter):
            without(values, key)
    values["profile"] = profile.purpose
    found, _ = _parse(values, (), "the recipe", base)
    kept = {key: origin for key, origin in profile.filled.items() if key not in before}
    whole = found.profile.model_copy(update={"filled": found.profile.filled | kept})
    return found.model_copy(update={"profile": whole})


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
    typed = [_typed(override) for override in _pairs(overrides)]
    final = _overridden(raw, typed)
    known = base or KnownBase(_source(final))
    start, defaults = fill_defaults(raw, final, known)
    values = _overridden(start, typed) if defaults else final
    given = {key: text for key, _, text in typed}
    _refuse_truths(values, where, given)
    _record(values, defaults, given, known.is_known)
    try:
        return Recipe.model_validate(values), given
    except ValidationError as error:
        raise BadInput(_sentence(error, where, given)) from error


def _overridden(raw: Mapping[str, Any], typed: Iterable[tuple[str, Any, str]]) -> dict[str, Any]:
    values = copy.deepcopy(dict(raw))
    for key, value, _ in typed:
        _override(values, key, value)
    return values


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
        stays = not any(_is_in(name, "base") for name in given)
        origins = dict(known) if stays and isinstance(known, dict) else {}
        profile = profile if stays else {}
    else:
        origins = {key: default.origin for key, default in defaults.items() if at(values, key) == default.value}
        profile = {"purpose": None if profile == NO_PROFILE else profile} if isinstance(profile, str) else profile
        profile = profile | {"settled": settled} if isinstance(profile, dict) and profile.get("purpose") else profile
    filled = {key: origin for key, origin in origins.items() if not any(_is_in(key, name) for name in given)}
    _shorten_warmup(values, filled, given)
    if isinstance(profile, dict) or filled:
        values["profile"] = (profile if isinstance(profile, dict) else {}) | {"filled": filled}


def _shorten_warmup(values: dict[str, Any], filled: dict[str, str], given: Iterable[str]) -> None:
    """Shortens a warm-up that nobody typed for a run of few steps: always one of a profile, and a recipe's own if it
    would be longer than the steps that were typed."""
    warmup, steps = at(values, WARMUP), at(values, "run.steps", Run().steps)
    if any(_is_in(WARMUP, name) for name in given) or type(warmup) is not int or type(steps) is not int:
        return
    typed = any(_is_in("run.steps", name) for name in given)
    fits = fitting_warmup(warmup, steps)
    if fits < warmup and (WARMUP in filled or (typed and warmup > steps)):
        values["optim"]["warmup"] = fits
        filled[WARMUP] = f"{filled.get(WARMUP, 'the recipe')}; shortened from {warmup} to a tenth of run.steps"


def _refuse_truths(values: Mapping[str, Any], where: str, given: Mapping[str, str]) -> None:
    """Refuses true and false (in YAML also yes, no, on and off) where a number belongs: pydantic takes them for 1 and
    0."""
    for section, inside in values.items():
        for name, value in inside.items() if isinstance(inside, dict) else ():
            fields = [option.model_fields[name] for option in _options(Recipe, section) if name in option.model_fields]
            kinds = {kind for field in fields for kind in (field.annotation, *get_args(field.annotation))}
            if isinstance(value, bool) and kinds & {int, float}:
                key = f"{section}.{name}"
                begin = "" if key in given else f"{where}: "
                raise BadInput(f"{begin}{key} is {given.get(key) or value}: give a number")


def _pairs(overrides: Any) -> list[Any]:
    """The overrides one by one. Python callers may give anything.

    Raises:
        BadInput: they are neither a list nor a dictionary.
    """
    if isinstance(overrides, Mapping):
        return list(overrides.items())
    if isinstance(overrides, str | bytes) or not isinstance(overrides, Iterable):
        raise BadInput(
            f"the overrides are {reprlib.repr(overrides)}: give a list such as ['run.steps=400'], or a dictionary"
        )
    return list(overrides)


def dump_recipe(recipe: Recipe) -> str:
    """Returns the resolved recipe as YAML text, with every key, in the order of the sections."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _typed(override: Any) -> tuple[str, Any, str]:
    """The key, the value and the value as it was typed. In `section.key=value`, texts and paths are taken as they
    are, all else is YAML."""
    if isinstance(override, tuple) and len(override) == 2 and isinstance(override[0], str):
        key, value = override
        if not key.partition(".")[0] or key.endswith("."):
            raise BadInput(f"{key!r:.200} is not a setting: write section.key, such as run.steps")
        return key, value, ""
    if not isinstance(override, str):
        raise BadInput(f"{reprlib.repr(override)} is not a setting: write 'run.steps=400', or give a dictionary")
    key, equals, text = override.partition("=")
    if not equals or not key.partition(".")[0] or key.endswith("."):
        raise BadInput(f"{override!r:.200} is not a setting: write section.key=value, such as run.steps=400")
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if text in ("", "null", "~") or quoted or not _is_text(key, text):
        return key, parse_yaml(text, f"the value of {reprlib.repr(override)}") if text else "", text
    return key, text, text


def _is_text(key: str, text: str) -> bool:
    """Whether `key` holds a text or a path and nothing else: a folder may be called "dog #2", or "2024"."""
    section, _, name = key.partition(".")
    if section == "base" and not name:
        return not (text.startswith("{") and ":" in text)  # base={source: ..., revision: ...}
    fields = [option.model_fields[name] for option in _options(Recipe, section) if name in option.model_fields]
    return bool(fields) and all(_is_text_type(field.annotation) for field in fields)


def _is_text_type(annotation: Any) -> bool:
    """str, Path, or either or None; without what an `Annotated` adds."""
    either = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    options = {getattr(option, "__origin__", option) for option in either} - {type(None)}
    return bool(options) and options <= {str, Path}


def _override(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets one key of a recipe's plain data."""
    section, _, name = key.partition(".")
    if isinstance(value, Path):
        value = str(value)
    if not name and _is_part(
        section, value
    ):  # what was given before stays: dreambooth gives run.name, data.photos, ...
        for inner in sorted(value, key=lambda inner: inner != "kind"):
            _override(values, f"{section}.{inner}", value[inner])
        return
    if not name:
        values[section] = value
        return
    inside = _opened(values, section, "source" if section == "base" else "kind")
    if section == "objective":
        older.forget_other_form(inside, name)
    part, _, rest = name.partition(".")
    if rest and any(_options(option, part) for option in _options(Recipe, section)):
        inside, name = _opened(inside, part, "kind"), rest
    if name == "kind" and inside.get("kind") != value:
        kept = {part: own for part, own in inside.items() if _is_shared(section, part, name)}
        inside.clear()  # each kind has its own keys: those of the former kind do not carry over
        inside.update(kept)
    inside[name] = value


def _is_shared(section: str, part: str, name: str) -> bool:
    """Whether `part` is a section that every kind of `section` has, as `others` of every prior."""
    options = _options(Recipe, section) if name == "kind" else []
    return bool(options) and all(_options(option, part) for option in options)


def _is_part(section: str, value: Any) -> bool:
    """Whether `value` holds some settings of a section, such as run={steps: 1}. Another base is another base."""
    if not isinstance(value, dict) or not all(isinstance(inner, str) for inner in value):
        return False
    return bool(_options(Recipe, section)) and not (section == "base" and "source" in value)


def _opened(values: dict[str, Any], name: str, shorthand: str) -> dict[str, Any]:
    """The dictionary at `name`. It is created if missing; a plain value becomes {`shorthand`: value}."""
    inside = values.setdefault(name, {})
    if not isinstance(inside, dict):
        inside = values[name] = {} if inside is None else {shorthand: inside}
    return inside


def _sentence(error: ValidationError, where: str, given: Mapping[str, str]) -> str:
    """pydantic's first error as one sentence that names the key, the value and what to do.

    An unknown key comes first: a missing key is often only a misspelt one. `where` is
    left out for what comes from `given`, the overrides (key -> value as typed): it is not in that file.
    """
    complaints = error.errors(include_url=False)
    first = next((item for item in complaints if item["type"] == "extra_forbidden"), complaints[0])
    first = next((item for item in complaints if item["loc"][:1] == ("profile",)), first)  # it fills in the others
    location = [str(part) for part in first["loc"] if "[" not in str(part)]  # without the options of a union
    known, shown = _keys_at(location[:-1])
    key = ".".join([*shown, *location[-1:]])
    begin = "" if _was_given(key, first, given) else f"{where}: "
    if first["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*shown, nearest[0]])!r}?" if nearest else f"known are {', '.join(known)}"
        return f"{begin}there is no setting {key!r:.200}; {hint}"
    if first["type"] == "missing":
        return f"{begin}{_missing(key, location)}"
    if first["type"].startswith("union_tag"):
        return f"{begin}{_wrong_kind(location, first.get('ctx', {}).get('tag'))}"
    if first["type"].startswith(("model_", "dataclass_")):
        return f"{begin}{_no_section(key, location, given.get(key) or reprlib.repr(first['input']))}"
    message = what_to_do(first)
    if any(item["type"].startswith("float_") and item["loc"][:-1] == first["loc"][:-1] for item in complaints[1:]):
        message += " or a number"  # the other option of a union
    said = not key or message.startswith(f"{key}.")  # errors between settings already name the key
    return f"{begin}{'' if said else f'{key}{_value(key, first, given)}: '}{message}"


def _was_given(key: str, fault: ErrorDetails, given: Iterable[str]) -> bool:
    """Whether an override set `key`, the section around it, its kind, or what the complaint is about."""
    if not key and given:  # settings that contradict each other; the sentence names them
        return True
    whole = fault["type"].startswith(("union_tag", "extra"))
    if any(_is_in(key, name) or (whole and _is_in(name, key)) for name in given):
        return True
    return fault["type"] == "value_error" and any(name in fault["msg"] for name in given)


def _is_in(key: str, section: str) -> bool:
    return f"{key}.".startswith(f"{section}.")


def _value(key: str, fault: ErrorDetails, given: Mapping[str, str]) -> str:
    """ " is VALUE", as it was typed or else as Python shows it. The whole of a section is not repeated."""
    typed, found = given.get(key), fault["input"]
    if typed and typed.strip() and not isinstance(found, str):
        return f" is {typed[:80]}"
    return "" if isinstance(found, dict) else f" is {reprlib.repr(found)[:80]}"


def _missing(key: str, location: Sequence[str]) -> str:
    number = location[-1].isdigit()
    nested = any(part.isdigit() for part in location)
    how = "give a value for it" if number else "give it in the recipe" + ("" if nested else f" or as {key}=VALUE")
    return f"{key!r} is missing: {how}"


def _no_section(key: str, location: list[str], value: str) -> str:
    """Says that there must be settings where a plain value is."""
    known, _ = _keys_at(location)
    kinds = _kinds_at(location) if "kind" in known else []
    example = f"{key}={{{known[0]}: ...}}" if any(part.isdigit() for part in location) else f"{key}.{known[0]}=VALUE"
    how = f"give one of {', '.join(kinds)}" if kinds else f"it has settings of its own, such as {example}"
    return f"{key} is {value[:80]}: {how}"


def _wrong_kind(location: list[str], tag: str | None) -> str:
    """Says what is wrong with the `kind` of the section at a pydantic location. `tag` is the given kind, or None."""
    key, kinds = ".".join(location), _kinds_at(location)
    if tag is None:
        return f"{key}.kind is missing: give one of {', '.join(kinds)}"
    nearest = difflib.get_close_matches(tag, kinds, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return f"there is no {key}.kind {tag!r:.100}; {hint}known are {', '.join(kinds)}"


def _kinds_at(location: list[str]) -> list[str]:
    """The possible kinds of the section at a pydantic location."""
    options: list[type[Settings]] = [Recipe]
    for part in location:
        options = [found for option in options for found in _options(option, part)]
    return [option.model_fields["kind"].default for option in options]


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
