"""The settings of a recipe for a form: read from its schema, and explained by docs/recipes.md."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from finetune.config.recipe import json_schema
from finetune.core.reading import read_utf8

# What the page chooses itself, and what would send something away from this machine
OWN = ("base", "profile", "data.class_noun", "run.name", "run.processes", "run.trackers")
HEADING = re.compile(r"^#+ `(\w+)`$")
KIND_ROW = re.compile(r"^\| `kind` \|")
KEY_ROW = re.compile(r"^\| key(?: of `([\w.]+)`)? \|")
LINK = re.compile(r"\[([^\]]+)\]\([^)]+\)")
NAME = re.compile(r"`(\w+)`")
PART = ("{}", "null")  # on with its defaults, off
ELSEWHERE = re.compile(r"[,;:]? (?:see [^;.]*|(?:a kind |an optimiser )?from the table below)$")  # in the document


@dataclass(frozen=True)
class Setting:
    """A setting that a page may change. `kind`: choice, switch, whole, number, text or part: a part of a section that
    can be left out as a whole, with the values `PART`. `of`: the kinds of its section that have it, such as ("lora",
    "dora"); empty for all. `about` says what it does, in Markdown."""

    key: str
    kind: str
    default: Any = None
    choices: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None
    of: tuple[str, ...] = ()
    about: str = ""


@cache
def free_settings() -> dict[str, Setting]:
    """Key -> setting, of all settings but those that name files, and `OWN`."""
    schema, texts = json_schema(), meanings()
    found: dict[str, Setting] = {}
    for setting in _leaves("", schema, schema["$defs"], ()):
        before = found.get(setting.key)
        about = texts.get(setting.key) or texts.get(setting.key.rpartition(".")[0], "")
        found[setting.key] = replace(setting, about=about) if before is None else _joined(before, setting)
    return {key: setting for key, setting in found.items() if not any(f"{key}.".startswith(f"{own}.") for own in OWN)}


def _leaves(key: str, node: Mapping[str, Any], known: Mapping[str, Any], of: tuple[str, ...]) -> Iterator[Setting]:
    """The settings under a node of the schema. A section that is one of several kinds gives each kind's settings."""
    node = _resolved(node, known)
    kinds = _kinds(node, known)
    if kinds:
        yield Setting(f"{key}.kind", "choice", _default_kind(node), tuple(kinds))
        for name, section in kinds.items():
            inner = {child: part for child, part in section["properties"].items() if child != "kind"}
            for child, part in inner.items():
                yield from _leaves(f"{key}.{child}", part, known, (name,))
    elif "properties" in node:
        if {"type": "null"} in node.get("anyOf", []):
            yield Setting(key, "part", node.get("default"), PART, of=of)
        for child, part in node["properties"].items():
            yield from _leaves(f"{key}.{child}".lstrip("."), part, known, of)
    elif not _names_files(node, known):
        yield _setting(key, node, of)


def _resolved(node: Mapping[str, Any], known: Mapping[str, Any]) -> Mapping[str, Any]:
    """A node with what it refers to in it; of a node that may be null, what it may be besides."""
    if "$ref" in node:
        return {**known[node["$ref"].rpartition("/")[2]], **node}
    options = [option for option in node.get("anyOf", []) if option.get("type") != "null"]
    return {**_resolved(options[0], known), **node} if len(options) == 1 else node


def _kinds(node: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Kind -> the section of that kind, where a node is one of several kinds."""
    options = [node, *node.get("anyOf", [])]
    mapping: dict[str, str] = next(
        (each["discriminator"]["mapping"] for each in options if "discriminator" in each), {}
    )
    return {name: known[place.rpartition("/")[2]] for name, place in mapping.items()}


def _default_kind(node: Mapping[str, Any]) -> Any:
    default = node.get("default")
    return default.get("kind") if isinstance(default, dict) else default


def _names_files(node: Any, known: Mapping[str, Any]) -> bool:
    if isinstance(node, dict):
        if node.get("format") == "path":
            return True
        if "$ref" in node and _names_files(known[node["$ref"].rpartition("/")[2]], known):
            return True
        return any(_names_files(each, known) for each in node.values())
    return isinstance(node, list) and any(_names_files(each, known) for each in node)


def _setting(key: str, node: Mapping[str, Any], of: tuple[str, ...]) -> Setting:
    kinds = {"boolean": "switch", "integer": "whole", "number": "number"}
    kind = "choice" if "enum" in node else kinds.get(str(node.get("type")), "text")
    least = node.get("minimum", node.get("exclusiveMinimum"))
    most = node.get("maximum", node.get("exclusiveMaximum"))
    choices = tuple(str(each) for each in node.get("enum", ()))
    return Setting(key, kind, node.get("default"), choices, least=least, most=most, of=of)


def _joined(one: Setting, other: Setting) -> Setting:
    """The same setting of two kinds of a section; what they do not share is left to the check of the recipe."""
    of, choices = tuple(dict.fromkeys(one.of + other.of)), tuple(dict.fromkeys(one.choices + other.choices))
    same = (one.least, one.most) == (other.least, other.most)
    kind = one.kind if one.kind == other.kind else "text"
    found = replace(one, kind=kind, of=of, choices=choices if kind in ("choice", "part") else ())
    found = found if same else replace(found, least=None, most=None)
    return found if one.default == other.default else replace(found, default=None)


def settings_rows(of_kind: str, base: Any) -> dict[str, Any]:
    """For the page: every free setting, and what the recipe would choose for this base, with its origin."""
    from finetune.config.profiles import defaults_of

    chosen = defaults_of("style" if of_kind == "style" else "subject", "lora", base).values
    free = free_settings()
    return {
        "settings": [asdict(setting) for setting in free.values()],
        "chosen": {key: [value.value, value.origin] for key, value in chosen.items() if key in free},
    }


def docs_file() -> Path:
    """docs/recipes.md: beside the package in a checkout, inside the package in a wheel."""
    inside = Path(__file__).parents[1] / "_docs" / "recipes.md"
    return inside if inside.is_file() else Path(__file__).parents[2] / "docs" / "recipes.md"


@cache
def meanings() -> dict[str, str]:
    """Key -> what docs/recipes.md says of it in its tables of keys."""
    found: dict[str, str] = {}
    section, prefix, kinds = "", "", False
    for line in read_utf8(docs_file()).splitlines():
        heading, keys = HEADING.match(line), KEY_ROW.match(line)
        if line.startswith("## "):
            section = heading[1] if heading else ""
        if keys or (not prefix and KIND_ROW.match(line)):
            prefix, kinds = (keys[1] or section, False) if keys else (section, True)
        elif not line.startswith("|"):
            prefix = ""
        elif kinds and prefix and (name := NAME.match(line.strip("| "))):
            text = f"`{name[1]}`: {_plain(line.strip('| ').split(' | ')[1])}"
            found[f"{prefix}.kind"] = "; ".join(filter(None, [found.get(f"{prefix}.kind"), text]))
        elif prefix:
            cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
            for name in NAME.findall(cells[0]):
                found.setdefault(f"{prefix}.{name}", _plain(cells[-1]))
    return found


def _plain(meaning: str) -> str:
    """A cell of a table without its links and without where more is said."""
    text = LINK.sub(r"\1", meaning.strip())
    return ELSEWHERE.sub("", text) or text
