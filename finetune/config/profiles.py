"""Defaults that follow the base. A recipe with `profile: subject` or `profile: style` leaves out the numbers that only
a base can tell: rate, steps, rank, layers, prior. A profile fills them in, and says where each comes from.

Profiles are data: the files in `profiles/`, one for each group of bases. Several may fit a base; for each setting the
most special one counts, which names the base or its size, before those for its family and those for all bases.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from finetune.core.reading import parse_yaml, read_utf8
from finetune.core.settings import Settings
from finetune.families.known import KnownBase

Purpose = Literal["subject", "style"]
PlainData = dict[str, Any]

# optimisers for which a rate of AdamW's is right too: the same rule with another form of its state (arXiv:2110.02861)
LIKE_ADAMW = ("adamw", "adamw8bit", "paged_adamw8bit")
NO_PROFILE = "none"  # what a person types for it
WARMUP = "optim.warmup"
LARGEST_WARMUP = 0.1  # share of a run's steps that a warm-up may take which nobody typed


class ProfileSettings(Settings):
    """The `profile:` section of a recipe. `purpose` says what is trained; None: nothing is filled in.

    A run's own recipe also records `filled`: setting -> where its value comes from; and `settled`: whether the base
    was known, so that nothing is filled in again.
    """

    purpose: Purpose | None = None
    filled: dict[str, str] = {}
    settled: bool = False

    @property
    def waits(self) -> bool:
        """Whether other defaults may fit once the base is known."""
        return self.purpose is not None and not self.settled

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        if value is None or isinstance(value, str):
            return {"purpose": None if value == NO_PROFILE else value}
        return value


class Bases(Settings):
    """Which bases a profile is for: all, those of some families, in a range of the denoiser's parameters, or `names`
    whatever they are."""

    names: list[str] = []
    families: list[str] = []
    parameters: tuple[float, float] | None = None

    def include(self, base: KnownBase) -> bool:
        """Whether `base` is one of them. A base of unknown family or size is in no group that names one."""
        if base.source in self.names:
            return True
        if self.parameters is not None:
            low, high = self.parameters
            if base.parameters is None or not low <= base.parameters <= high:
                return False
        return not (self.names or self.families) or base.family in self.families

    @property
    def order(self) -> int:
        """Larger for more special ones."""
        return 2 * bool(self.names or self.parameters) + bool(self.families)


class ProfileEntry(Settings):
    """`settings`: "section.key" -> (value, name of its source), for some purposes and methods.

    `needs`: setting -> another one. The first is filled in only while the other is what the profile says, or is on
    with settings of its own.
    """

    purposes: list[Purpose]
    methods: list[str]
    settings: dict[str, tuple[Any, str]]
    needs: dict[str, str] = {}


class Profile(Settings):
    """A file of `profiles/`. `sources`: name -> where values come from, in words."""

    name: str
    bases: Bases
    sources: dict[str, str]
    entries: list[ProfileEntry]

    @model_validator(mode="after")
    def _sources_are_known(self) -> Profile:
        for key, (_, source) in ((key, pair) for entry in self.entries for key, pair in entry.settings.items()):
            if source not in self.sources:
                raise ValueError(f"the profile {self.name} has no source {source!r} for {key}: add it to sources")
        return self


@dataclass(frozen=True)
class Default:
    """A value that a profile fills in, and where it comes from."""

    value: Any
    origin: str


@dataclass
class Defaults:
    """What the profiles of a base say for a purpose and a method."""

    values: dict[str, Default] = field(default_factory=dict)
    needs: dict[str, str] = field(default_factory=dict)


@cache
def profiles() -> tuple[Profile, ...]:
    """All shipped profiles, the most special ones last."""
    files = sorted((Path(__file__).parent / "profiles").glob("*.yaml"))
    read = [Profile.model_validate(parse_yaml(read_utf8(file), str(file))) for file in files]
    return tuple(sorted(read, key=lambda profile: profile.bases.order))


def defaults_of(purpose: str, method: str, base: KnownBase) -> Defaults:
    """The defaults for this base: "section.key" -> value and origin."""
    found = Defaults()
    for profile in profiles():
        if not profile.bases.include(base):
            continue
        for entry in profile.entries:
            if purpose in entry.purposes and method in entry.methods:
                for key, (value, source) in entry.settings.items():
                    found.values[key] = Default(value, f"{profile.name}: {profile.sources[source]}")
                found.needs |= entry.needs
    return found


def fill_defaults(raw: PlainData, final: PlainData, base: KnownBase) -> tuple[PlainData, dict[str, Default]]:
    """Adds the defaults of a base to a recipe's plain data, where it says nothing itself.

    Args:
        raw: the recipe as its file has it. Overrides come later, as over any file.
        final: the same with all overrides, which choose the base, the method and the kinds of the sections.

    Returns:
        A copy of `raw` with the defaults, and those that were added.
    """
    purpose, method = _purpose(final.get("profile")), _kind(final.get("method"))
    if purpose is None or method is None:
        return raw, {}
    filled, added = copy.deepcopy(raw), {}
    defaults = defaults_of(purpose, method, base)
    left_out = set(_idle(defaults, final))
    for section in dict.fromkeys(key.partition(".")[0] for key in defaults.values):
        own = {key: default for key, default in defaults.values.items() if key.partition(".")[0] == section}
        if _agrees(own.get(f"{section}.kind"), _kind(final.get(section))) and _open(filled, section, final):
            for key, default in own.items():
                name = key.partition(".")[2]
                if key not in left_out and name not in filled[section]:
                    filled[section][name] = copy.deepcopy(default.value)
                    added[key] = default
    return filled, added


def _purpose(section: Any) -> str | None:
    """The purpose of a recipe that is still to be filled in. A run's own recipe says that it is settled."""
    if isinstance(section, Mapping):
        section = None if "settled" in section else section.get("purpose")
    return section if isinstance(section, str) and section != NO_PROFILE else None


def _kind(section: Any) -> str | None:
    kind = section.get("kind") if isinstance(section, Mapping) else section
    return kind if isinstance(kind, str) else None


def _agrees(wanted: Default | None, kind: str | None) -> bool:
    """Whether the settings for one kind of a section fit the kind that it has."""
    return wanted is None or kind is None or fits_too(kind, wanted.value)


def fits_too(kind: Any, other: Any) -> bool:
    """Whether a section's settings for one kind are right for the other too."""
    return kind == other or (kind in LIKE_ADAMW and other in LIKE_ADAMW)


def _idle(defaults: Defaults, final: PlainData) -> Iterator[str]:
    """Settings whose other setting, which they need, is off or has another value here."""
    for key, other in defaults.needs.items():
        given = at(final, other, defaults.values[other].value)
        if given != defaults.values[other].value and not isinstance(given, Mapping):
            yield key


def _open(values: PlainData, section: str, final: PlainData) -> bool:
    """Makes `section` a dictionary of the kind that it will have; False if it holds something odd, which is refused
    later."""
    kind, inside = _kind(final.get(section)), values.setdefault(section, {})
    if isinstance(inside, str):
        inside = values[section] = {"kind": inside}
    if not isinstance(inside, dict):
        return False
    if kind is not None and not fits_too(kind, inside.get("kind", kind)):
        inside.clear()  # another kind was asked for, which has its own settings
    if kind is not None:
        inside["kind"] = kind
    return True


def at(values: Any, key: str, missing: Any = None) -> Any:
    """The value of `section.key` in a recipe's plain data."""
    for part in key.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return missing
        values = values[part]
    return values


def without(values: PlainData, key: str) -> None:
    """Removes `section.key`, and the section if nothing is left in it."""
    section, _, name = key.partition(".")
    values[section].pop(name, None)
    if not values[section]:
        del values[section]


def fitting_warmup(warmup: int, steps: int) -> int:
    """A warm-up that nobody typed, shortened for a run of few steps."""
    return min(warmup, int(LARGEST_WARMUP * steps))


def rows(filled: Mapping[str, str], values: PlainData) -> list[str]:
    """The defaults in words: one text for each origin, with the settings and values that come from it."""
    by_origin: dict[str, list[str]] = {}
    for key, origin in filled.items():
        by_origin.setdefault(origin, []).append(f"{key} {_shown(at(values, key))}")
    return [f"{', '.join(settings)} ({origin})" for origin, settings in by_origin.items()]


def _shown(value: Any) -> str:
    if isinstance(value, Mapping) and "kind" in value:
        value = value["kind"]
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_shown(inside)}' for key, inside in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
