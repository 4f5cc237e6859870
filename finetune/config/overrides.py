"""Overrides: settings that a person types, or gives in Python, on top of a recipe."""

from __future__ import annotations

import copy
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from finetune.config.profiles import at, fits_too
from finetune.config.recipe import Recipe
from finetune.config.sections import is_in, sections_at
from finetune.core.errors import BadInput
from finetune.core.reading import parse_yaml
from finetune.objectives import older

UNNAMED = {"optim": "adamw"}  # the kind that a file's settings are for which leaves it to its profile
_MISSING = object()

# "section.key=value" as a person types it; or a key and a value, which is taken as it is
Overrides = Sequence[str | tuple[str, Any]] | Mapping[str, Any]


def pairs(overrides: Any) -> list[Any]:
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


def typed_override(override: Any) -> tuple[str, Any, str]:
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


def overridden(raw: Mapping[str, Any], typed: Iterable[tuple[str, Any, str]]) -> dict[str, Any]:
    """A copy of a recipe's plain data with overrides (see `typed_override`) applied in order.

    What was typed before a kind is typed for that kind: `optim.lr=3e-5 optim.kind=adamw8bit` is the same in the other
    order.
    """
    values, before = copy.deepcopy(dict(raw)), list[tuple[str, Any]]()
    for key, value in (leaf for typed_key, whole, _ in typed for leaf in _leaves(typed_key, whole)):
        _set(values, key, value)
        for earlier in _typed_for(key, before) if value is not None else []:
            if at(values, earlier[0], _MISSING) is _MISSING:
                _set(values, *earlier)
        before.append((key, value))
    return values


def _typed_for(key: str, before: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """The overrides before `key` that are for the kind that it chooses: all of its section, if none of them chose."""
    chosen = _chosen(key)
    inside = [pair for pair in before if chosen is not None and is_in(pair[0], chosen)]
    return [] if any(_chosen(name) == chosen for name, _ in inside) else inside


def _leaves(key: str, value: Any) -> list[tuple[str, Any]]:
    """The settings of a section that is given whole, its kind first; of anything else itself."""
    if "." in key or not _is_part(key, value):
        return [(key, value)]
    return [(f"{key}.{name}", value[name]) for name in sorted(value, key=lambda name: name != "kind")]


def _chosen(key: str) -> str | None:
    """The section, or the part of one, whose kind the setting `key` chooses; None for any other setting."""
    section, _, name = key.partition(".")
    if (
        not name
        and section != "base"
        and not any("kind" in option.model_fields for option in sections_at(Recipe, section))
    ):
        return None  # data=5: it has settings, and no kind
    if name in ("", "kind") or (section, name) == ("base", "source"):
        return section
    part, _, rest = name.partition(".")
    is_part = any(sections_at(option, part) for option in sections_at(Recipe, section))
    return f"{section}.{part}" if is_part and rest in ("", "kind") else None


def _is_text(key: str, text: str) -> bool:
    """Whether `key` holds a text or a path and nothing else: a folder may be called "dog #2", or "2024"."""
    section, _, name = key.partition(".")
    if section == "base" and not name:
        return not (text.startswith("{") and ":" in text)  # base={source: ..., revision: ...}
    fields = [option.model_fields[name] for option in sections_at(Recipe, section) if name in option.model_fields]
    return bool(fields) and all(_is_text_type(field.annotation) for field in fields)


def _is_text_type(annotation: Any) -> bool:
    """str, Path, or either or None; without what an `Annotated` adds."""
    either = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    options = {getattr(option, "__origin__", option) for option in either} - {type(None)}
    return bool(options) and options <= {str, Path}


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets one key of a recipe's plain data."""
    section, _, name = key.partition(".")
    if isinstance(value, Path):
        value = str(value)
    if not name:
        values[section] = value
        return
    inside = _opened(values, section, "source" if section == "base" else "kind")
    if section == "objective":
        older.forget_other_form(inside, name)
    part, _, rest = name.partition(".")
    if rest and any(sections_at(option, part) for option in sections_at(Recipe, section)):
        inside, name = _opened(inside, part, "kind"), rest
    if name == "kind" and not fits_too(value, inside.get("kind", UNNAMED.get(section))):
        kept = {part: own for part, own in inside.items() if _is_shared(section, part, name)}
        inside.clear()  # each kind has its own keys: those of the former kind do not carry over
        inside.update(kept)
    inside[name] = value


def _is_shared(section: str, part: str, name: str) -> bool:
    """Whether `part` is a section that every kind of `section` has, as `others` of every prior."""
    options = sections_at(Recipe, section) if name == "kind" else []
    return bool(options) and all(sections_at(option, part) for option in options)


def _is_part(section: str, value: Any) -> bool:
    """Whether `value` holds some settings of a section, such as run={steps: 1}. Another base is another base."""
    if not isinstance(value, dict) or not all(isinstance(inner, str) for inner in value):
        return False
    return bool(sections_at(Recipe, section)) and not (section == "base" and "source" in value)


def _opened(values: dict[str, Any], name: str, shorthand: str) -> dict[str, Any]:
    """The dictionary at `name`. It is created if missing; a plain value becomes {`shorthand`: value}."""
    inside = values.setdefault(name, {})
    if not isinstance(inside, dict):
        inside = values[name] = {} if inside is None else {shorthand: inside}
    return inside
