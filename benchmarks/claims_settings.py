"""Which settings a row of claims.jsonl was measured with, and whether they are still those of its case.

A row names its recipe by a hash; claims_recipes.json keeps the settings behind each hash. A setting that a row does
not know came into the package after it. The row still holds if today's recipe leaves that setting at its default.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.config.recipe import Recipe

RECIPES = Path(__file__).with_name("claims_recipes.json")
# what differs by subject, only names where values come from, or changes the rounding alone
APART: dict[str, Any] = {"profile": True, "data": {"photos"}, "run": {"fast"}}
Settings = dict[str, Any]


def digest(recipe: Recipe) -> str:
    """A hash of the whole recipe without its photos."""
    return hashlib.sha256(recipe.model_dump_json(exclude=APART).encode()).hexdigest()[:12]


def known() -> dict[str, Settings]:
    """The settings behind each hash."""
    return json.loads(RECIPES.read_text(encoding="utf-8")) if RECIPES.is_file() else {}


def keep(recipe: Recipe) -> None:
    """Stores the settings behind a recipe's hash."""
    found = known() | {digest(recipe): recipe.model_dump(mode="json", exclude=APART)}
    lines = [f"{json.dumps(name)}: {json.dumps(found[name], sort_keys=True)}" for name in sorted(found)]
    RECIPES.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8", newline="\n")


def still_holds(old: Settings, recipe: Recipe) -> bool:
    """Whether settings of a row are those of `recipe`."""
    old = {**old, "run": {name: value for name, value in old["run"].items() if name not in APART["run"]}}
    now = recipe.model_dump(mode="json", exclude=APART)
    return _agree(old, now, recipe.model_dump(mode="json", exclude=APART, exclude_defaults=True))


def _agree(old: Mapping[str, Any], now: Mapping[str, Any], changed: Mapping[str, Any]) -> bool:
    """`changed`: the part of `now` that is not at its default."""
    if not (old.keys() <= now.keys() and changed.keys() <= old.keys()):
        return False
    return all(_alike(value, now[name], changed.get(name, {})) for name, value in old.items())


def _alike(old: Any, now: Any, changed: Any) -> bool:
    if isinstance(old, dict) and isinstance(now, dict):
        return _agree(old, now, changed)
    return bool(old == now)
