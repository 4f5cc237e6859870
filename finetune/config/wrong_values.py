"""What is wrong with a recipe, as one sentence that names the key, the value and what to do."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from finetune.config.recipe import Recipe
from finetune.config.sections import is_in, sections_at
from finetune.core.complaints import what_to_do
from finetune.core.errors import BadInput
from finetune.core.settings import Settings


def refuse_truths(values: Mapping[str, Any], where: str, given: Mapping[str, str]) -> None:
    """Refuses true and false (in YAML also yes, no, on and off) where a number belongs: pydantic takes them for 1 and
    0.

    Raises:
        BadInput: a number is true or false.
    """
    for section, inside in values.items():
        for name, value in inside.items() if isinstance(inside, dict) else ():
            fields = [
                option.model_fields[name] for option in sections_at(Recipe, section) if name in option.model_fields
            ]
            kinds = {kind for field in fields for kind in (field.annotation, *get_args(field.annotation))}
            if isinstance(value, bool) and kinds & {int, float}:
                key = f"{section}.{name}"
                begin = "" if key in given else f"{where}: "
                raise BadInput(f"{begin}{key} is {given.get(key) or value}: give a number")


def what_is_wrong(error: ValidationError, where: str, given: Mapping[str, str]) -> str:
    """pydantic's first error as one sentence that names the key, the value and what to do.

    An unknown key comes first: a missing key is often only a misspelt one. `where` is left out for what comes from
    `given`, the overrides (key -> value as typed): it is not in that file.
    """
    complaints = error.errors(include_url=False)
    first = next((item for item in complaints if item["type"] == "extra_forbidden"), complaints[0])
    for section in ("method", "profile"):  # what is wrong there leaves the others without their defaults
        first = next((item for item in complaints if _names_no_kind(item, section)), first)
    location = [str(part) for part in first["loc"] if "[" not in str(part)]  # without the options of a union
    known, shown = _keys_at(location[:-1])
    key = ".".join([*shown, *location[-1:]])
    begin = "" if _was_given(key, first, given) else f"{where}: "
    if first["type"] == "extra_forbidden":
        return f"{begin}there is no setting {key!r:.200}{_instead(location, known, shown)}"
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


def _names_no_kind(fault: ErrorDetails, section: str) -> bool:
    """Whether the fault is in the section itself, not in one of its settings."""
    if section == "profile":
        return fault["loc"][:1] == (section,)
    return fault["loc"] == (section,) and fault["type"] != "missing"


def _instead(location: list[str], known: list[str], shown: list[str]) -> str:
    """What a person may have meant by an unknown setting: another name, or another kind of its section."""
    nearest = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
    if nearest:
        return f"; did you mean {'.'.join([*shown, nearest[0]])!r}?"
    kinds = _kinds_with(location) if "kind" in known else []
    if kinds:
        section = ".".join(shown)
        belongs = f"it belongs to {' and '.join(kinds)}. Leave it out, or give {section}.kind={kinds[0]}"
        return f" for {section}.kind={location[-2]}: {belongs}"
    elsewhere = [] if shown else [repr(name) for name in settings_named(location[-1])]
    return f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else f"; known are {', '.join(known)}"


def settings_named(name: str) -> list[str]:
    """Returns the settings of this name, each with its section: of `steps` run.steps and others, the run's first."""
    sections = ["run", *(section for section in Recipe.model_fields if section not in ("run", "profile"))]
    having = [
        section for section in sections if any(name in form.model_fields for form in sections_at(Recipe, section))
    ]
    return [f"{section}.{name}" for section in having]


def _kinds_with(location: list[str]) -> list[str]:
    """The kinds of the section at a pydantic location (section, kind, name) that have a setting of this name."""
    if len(location) != 3:
        return []
    section, _, name = location
    return [
        option.model_fields["kind"].default
        for option in sections_at(Recipe, section)
        if "kind" in option.model_fields and name in option.model_fields
    ]


def _was_given(key: str, fault: ErrorDetails, given: Iterable[str]) -> bool:
    """Whether an override set `key`, the section around it, its kind, or what the complaint is about."""
    if not key and given:  # settings that contradict each other; the sentence names them
        return True
    whole = fault["type"].startswith(("union_tag", "extra"))
    if any(is_in(key, name) or (whole and is_in(name, key)) for name in given):
        return True
    return fault["type"] == "value_error" and any(name in fault["msg"] for name in given)


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
        options = [found for option in options for found in sections_at(option, part)]
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
        options = sections_at(model, part)
        model = options[0] if options else model
        kinds = {option.model_fields["kind"].default: option for option in options} if len(options) > 1 else {}
        shown.append(part)
    return list(model.model_fields), shown
