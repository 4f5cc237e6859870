"""What of another trainer's settings becomes which key of a recipe, and what has no counterpart: each is named."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.config.load import parse_recipe
from finetune.core.errors import BadInput
from finetune.data.photos import SUFFIXES

CARRIED, LEFT, OFF = "carried over", "no counterpart", "off"
ROUNDS = 30  # settings that the recipe may refuse one after the other
SCHEDULES = ("constant", "cosine", "linear")
PRECISIONS = {
    "no": "fp32", "float": "fp32", "fp32": "fp32", "float32": "fp32", "float_32": "fp32",
    "fp16": "fp16", "float16": "fp16", "float_16": "fp16",
    "bf16": "bf16", "bfloat16": "bf16", "bfloat_16": "bf16",
}  # fmt: skip
# the names of kohya, OneTrainer, ai-toolkit and diffusers in lower case, without _ and -
OPTIMISERS = {
    "": "adamw", "adamw": "adamw", "adamw8bit": "adamw8bit", "pagedadamw8bit": "paged_adamw8bit",
    "lion8bit": "lion8bit", "prodigy": "prodigy", "adamwschedulefree": "schedule_free",
    "schedulefreeadamw": "schedule_free",
}  # fmt: skip


class NoCounterpart(Exception):
    """A value that no recipe can have; the message says why."""


@dataclass(frozen=True)
class Rule:
    """`ours`: the recipe's key; `of` makes its value, or raises `NoCounterpart`."""

    ours: str
    of: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True)
class Line:
    """What became of one setting. `ours`: the recipe's key and value, or empty; `why`: a reason, or empty."""

    key: str
    value: Any
    action: str
    ours: str = ""
    why: str = ""

    @property
    def text(self) -> str:
        """The line for people."""
        became = f" -> {self.ours}" if self.ours else ""
        return f"{self.key} = {short(self.value)}: {self.action}{became}{f' ({self.why})' if self.why else ''}"


@dataclass
class Carried:
    """A recipe's plain data, in the making, and a line for each setting that it was made from.

    `trainer`: whose settings they are. `home`: the folder from which relative paths count.
    """

    trainer: str
    home: Path
    values: dict[str, Any] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)

    def put(self, key: str, value: Any, ours: str, found: Any, why: str = "") -> None:
        """Writes `found` to the recipe's key `ours`, as what the setting `key` says."""
        place = self.values
        *sections, name = ours.split(".")
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = found
        self.note(key, value, ours, found, why)

    def note(self, key: str, value: Any, ours: str, found: Any, why: str = "") -> None:
        """Says that a setting was carried over, without writing it."""
        self.lines.append(Line(key, value, CARRIED, f"{ours}={short(found)}", why))

    def leave(self, key: str, value: Any, why: str) -> None:
        """Names a setting that has no counterpart, or is off."""
        self.lines.append(Line(key, value, OFF if is_off(value) else LEFT, "", "" if is_off(value) else why))

    def at(self, ours: str, default: Any = None) -> Any:
        """What the recipe has at a key."""
        place: Any = self.values
        for name in ours.split("."):
            place = place.get(name) if isinstance(place, dict) else None
        return default if place is None else place

    def carry(self, settings: Mapping[str, Any], rules: Mapping[str, Rule], reasons: Mapping[str, str]) -> None:
        """Applies a rule to each setting that has one, and names the others with the reason that is known."""
        for key, value in settings.items():
            rule = rules.get(key)
            if rule is None or value is None:
                self.leave(key, value, reasons.get(key, f"a recipe has nothing for it, or {self.trainer} has none"))
                continue
            try:
                self.put(key, value, rule.ours, rule.of(value))
            except NoCounterpart as error:
                self.leave(key, value, str(error))
            except (TypeError, ValueError):
                self.leave(key, value, "its value is not of the kind that is expected")

    def folder(self, text: Any) -> Path:
        """A path as the settings name it: below the settings' own folder, if it is there, or as it is."""
        beside = self.home / str(text)
        return beside.absolute() if beside.exists() else Path(str(text)).expanduser()

    def drop(self, ours: str, why: str) -> None:
        """Takes a key back that the recipe refuses; its line says so."""
        *sections, name = ours.split(".")
        place = self.values
        for section in sections:
            place = place[section]
        del place[name]
        self.lines = [
            Line(line.key, line.value, LEFT, "", why) if line.ours.split("=")[0] == ours else line
            for line in self.lines
        ]


def finished(carried: Carried, where: str) -> dict[str, Any]:
    """The recipe's plain data, which `parse_recipe` accepts. A setting that it refuses as without effect is named.

    Raises:
        BadInput: there is no folder of photos, or no valid recipe can be made.
    """
    if not carried.at("data.photos"):
        raise BadInput(f"{where} names no folder of photos: add it, or give the folder itself")
    carried.values.setdefault("method", {}).setdefault("kind", "lora")
    carried.values.setdefault("optim", {}).setdefault("kind", "adamw")
    for _ in range(ROUNDS):
        try:
            parse_recipe(carried.values, where="the recipe")
            return carried.values
        except BadInput as error:
            refused = next((key for key in _keys(carried) if key in str(error) and carried.at(key) is not None), None)
            if refused is None:
                raise BadInput(f"{where} makes no valid recipe: {error}") from error
            carried.drop(refused, str(error))
            if refused == "prior.folder" and carried.at("prior.count") is not None:
                carried.drop("prior.count", "it was the number of these class images")
    raise BadInput(f"{where} makes no valid recipe: {ROUNDS} of its settings are refused")


def _keys(carried: Carried) -> list[str]:
    """The recipe's keys that were carried over, without those that a recipe can't lack."""
    keys = [line.ours.split("=")[0] for line in carried.lines if line.ours]
    return [key for key in keys if key not in ("data.photos", "method.kind", "optim.kind", "base")]


def is_off(value: Any) -> bool:
    """Whether a setting says nothing: false, none, empty or 0."""
    return value in (None, False, "", 0) or (isinstance(value, list | dict) and not value)


def short(value: Any) -> str:
    """A value in a line."""
    text = " ".join(str(value).split())
    return text if len(text) <= 160 else f"{text[:157]}..."


def flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as ("network.linear", 16), ...; lists stay whole."""
    for key, value in settings.items():
        name = f"{before}{key}"
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{name}.")
        else:
            yield name, value


# makers of values


def whole(value: Any) -> int:
    """A whole number, also from text."""
    number = float(value)
    if isinstance(value, bool) or not number.is_integer():
        raise NoCounterpart("it must be a whole number here")
    return int(number)


def number(value: Any) -> float:
    """A number, also from text such as 1e-4."""
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise NoCounterpart("it must be a number here")
    return float(value)


def positive(value: Any) -> float:
    """A number above 0."""
    found = number(value)
    if found <= 0:
        raise NoCounterpart("off")
    return found


def truth(value: Any) -> bool:
    """True or false, also from text."""
    return str(value).strip().lower() in ("true", "1", "yes", "on")


def as_text(value: Any) -> str:
    """A text."""
    return str(value)


def one_of(table: Mapping[Any, Any]) -> Callable[[Any], Any]:
    """A maker that takes the value from a table."""

    def made(value: Any) -> Any:
        if value not in table:
            raise NoCounterpart(f"there are {', '.join(table)}")
        return deepcopy(table[value])  # rules may add to it

    return made


def choice(yes: str, no: str) -> Callable[[Any], str]:
    """A maker of one of two words, from true or false."""
    return lambda value: yes if truth(value) else no


def min_snr(value: Any) -> dict[str, Any]:
    """The recipe's `objective.weighting`, from its gamma."""
    return {"kind": "min_snr", "gamma": positive(value)}


def optimiser(value: Any) -> str:
    """The recipe's `optim.kind`."""
    name = re.sub(r"[_\- ]", "", str(value).split(".")[-1]).lower()
    if name not in OPTIMISERS:
        raise NoCounterpart(f"there are {', '.join(dict.fromkeys(OPTIMISERS.values()))}")
    return OPTIMISERS[name]


def schedule(value: Any) -> str:
    """The recipe's `optim.schedule`."""
    name = str(value).lower().removesuffix("_with_warmup")
    if name not in SCHEDULES:
        raise NoCounterpart(f"there are {', '.join(SCHEDULES)}")
    return name


def precision(value: Any) -> str:
    """The recipe's `run.precision`."""
    name = str(value).lower()
    if name not in PRECISIONS:
        raise NoCounterpart("there are fp32, bf16 and fp16")
    return PRECISIONS[name]


def resolution(value: Any) -> int:
    """The recipe's `data.resolution`: a number, "512,768", [512, 768]; of two sides the square of the same area, in
    steps of 64."""
    sides = value if isinstance(value, list) else str(value).replace("x", ",").split(",")
    sizes = [whole(side) for side in sides]
    if len(sizes) == 1 or len(set(sizes)) == 1:
        return sizes[0]
    if len(sizes) != 2:
        raise NoCounterpart("a recipe has one resolution")
    return max(64, round(math.sqrt(sizes[0] * sizes[1]) / 64) * 64)


def run_name(value: Any) -> str:
    """The recipe's `run.name`, without the characters that a file can't have."""
    name = re.sub(r"[^\w .+-]", "-", str(value)).strip(" .-_+")
    if not name:
        raise NoCounterpart("no file can have that name")
    return name[:100]


def images_in(folder: Path) -> int:
    """The number of images in a folder; 0 if it is not there."""
    if not folder.is_dir():
        return 0
    return sum(file.suffix.lower() in SUFFIXES and not file.name.startswith(".") for file in folder.iterdir())


def split_words(text: str) -> tuple[str, str]:
    """The token and the class noun of "sks dog"; the noun is empty in "sks"."""
    token, _, noun = text.strip().partition(" ")
    return token, noun.strip()


def put_subject(carried: Carried, key: str, words: str, template: str = "") -> None:
    """Writes token, class noun and template of "sks dog". Other trainers' tokens may have several pieces."""
    token, noun = split_words(words)
    carried.put(key, words, "data.token", token)
    if noun:
        carried.put(key, words, "data.class_noun", noun)
    carried.put(key, words, "data.token_pieces", 32, "other trainers allow a token of any pieces")
    carried.put(key, words, "data.templates", [template or ("{token} {noun}" if noun else "{token}")])


def epochs_to_steps(epochs: int, seen: int, batch: int) -> int:
    """Steps in which `seen` photos an epoch are trained on, `batch` in each."""
    return max(1, math.ceil(seen / batch) * epochs)


def pairs_of(arguments: Sequence[Any]) -> dict[str, str]:
    """{"weight_decay": "0.1"} of ["weight_decay=0.1"], as kohya writes further arguments."""
    return dict(str(item).partition("=")[::2] for item in arguments)
