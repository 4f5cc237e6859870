"""Drafts that are kept, so that they can be opened again, and recipe files that were sent."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.core.errors import BadInput
from finetune.core.files import write_json, write_text
from finetune.core.reading import parse_yaml, read_json, read_utf8
from finetune.ui.drafts import HUB_ID, TINY
from finetune.ui.uploads import Uploads

LARGEST_RECIPE = 1_000_000  # bytes
KEPT = ("kind", "noun", "base", "like", "more", "file", "fileName")  # of a draft
LONGEST_VALUE = 10_000  # characters
ID = re.compile(r"[0-9a-f]{16}")
FILLED = ("profile.filled", "profile.settled")  # a run writes them


class KeptDrafts:
    """The drafts in FOLDER/drafts, one for each set of photos, and the recipes in FOLDER/recipes."""

    def __init__(self, uploads: Uploads) -> None:
        self.uploads = uploads

    def keep(self, chosen: str, values: Mapping[str, Any]) -> None:
        """Keeps what a person has filled in for a set of photos.

        Raises:
            BadInput: there is no such set.
        """
        own = {key: values[key] for key in KEPT if isinstance(values.get(key), str)}
        kept = {key: value for key, value in own.items() if len(value) <= LONGEST_VALUE}
        write_json(self._file(chosen), kept)

    def of(self, chosen: str) -> dict[str, str]:
        """What was filled in for a set; empty for none.

        Raises:
            BadInput: there is no such set.
        """
        file = self._file(chosen)
        try:
            return read_json(file, dict) if file.is_file() else {}
        except BadInput:
            return {}

    def listed(self) -> list[dict[str, Any]]:
        """The sets of photos, the newest first: what they show, as far as it was said, and their number of files."""
        found = []
        for name in self.uploads.sets()[:20]:
            draft, photos = self.of(name), self.uploads.photos_of(name)
            about = {"name": name, "kind": draft.get("kind", ""), "noun": draft.get("noun", "")}
            found.append(about | {"photos": self.uploads.count(name), "changed": photos.stat().st_mtime})
        return found

    def take_recipe(self, content: bytes) -> dict[str, Any]:
        """Keeps what a page may use of a recipe file, and returns what it says of the draft.

        Raises:
            BadInput: it is no recipe.
        """
        from finetune.config.load import parse_recipe

        chosen = secrets.token_hex(8)
        file = self.uploads.folder / "recipes" / f"{chosen}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, content.decode("utf-8", "replace"))
        try:
            raw = parse_yaml(read_utf8(file, LARGEST_RECIPE), "the recipe")
            if not isinstance(raw, dict):
                raise BadInput("this file is no recipe: send a YAML file with sections such as data and method")
            places = ["data.photos=photos", *([f"data.class_noun={_noun(raw)}"] if _noun(raw) else [])]
            parse_recipe(raw, places, where="the recipe")  # as it was sent: an unknown key is told
            used, left = _used(raw)
            parse_recipe(used, places, where="the recipe without what names files")
            _write(file, used)
        except BadInput:
            file.unlink(missing_ok=True)
            raise
        return {"file": chosen, "left": left, **_draft_values(raw)}

    def recipe(self, chosen: str) -> Path | None:
        """The file of a recipe that was sent; None for "".

        Raises:
            BadInput: it is not there.
        """
        if not chosen:
            return None
        file = self.uploads.folder / "recipes" / f"{chosen}.yaml"
        if not ID.fullmatch(chosen) or not file.is_file():
            raise BadInput("this recipe is not here any more: send the file again")
        return file

    def _file(self, chosen: str) -> Path:
        return self.uploads.folder / "drafts" / f"{self.uploads.photos_of(chosen).name}.json"


def _write(file: Path, values: Mapping[str, Any]) -> None:
    import yaml

    write_text(file, yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True))


def _used(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The settings that a page may use, as a recipe; and the keys of the others, which it chooses itself."""
    from finetune.ui.settings_list import free_settings

    free = free_settings()
    used: dict[str, Any] = {}
    left: list[str] = []
    for key, value in _flat("", raw):
        profile = key.split(".")[0] == "profile" and key not in FILLED
        known = any(key == name or key.startswith(f"{name}.") or name == f"{key}.kind" for name in free)
        if not profile and (not known or any(sign in str(value) for sign in ("/", "\\", "~", "$"))):
            left += [] if key in FILLED or key.split(".")[0] == "base" else [key]
            continue
        _put(used, key.split("."), value)
    return used, [key for key in left if key not in ("data.photos", "data.class_noun", "run.name", "run.dir")]


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield from _flat(f"{key}.", value)
        else:
            yield key, value


def _put(values: dict[str, Any], path: list[str], value: Any) -> None:
    for name in path[:-1]:
        held = values.setdefault(name, {})
        if not isinstance(held, dict):
            held = values[name] = {"kind": held}
        values = held
    values[path[-1]] = value


def _noun(raw: Mapping[str, Any]) -> str:
    data = raw.get("data")
    return str(data.get("class_noun") or "") if isinstance(data, dict) else ""


def _draft_values(raw: Mapping[str, Any]) -> dict[str, str]:
    """Noun, kind and base as the recipe has them, where a page may use them."""
    data, base = raw.get("data"), raw.get("base")
    style = isinstance(data, dict) and bool(data.get("trigger")) and not _noun(raw)
    source = str(base.get("source", "") if isinstance(base, dict) else base or "")
    usable = source == TINY or bool(HUB_ID.fullmatch(source) and not Path(source).exists())
    return {"kind": "style" if style else "thing", "noun": _noun(raw)[:40], "base": source if usable else ""}
