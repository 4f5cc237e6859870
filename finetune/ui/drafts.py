"""What a person chose on the page, as settings of a shipped recipe: the same as a command would take."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.core.errors import BadInput
from finetune.ui.plain_words import without_places
from finetune.ui.started import shown_command
from finetune.ui.uploads import MASK

RECIPES = {"thing": "dreambooth-lora", "style": "style-lora"}
TINY = "tiny"
TINY_SIDE = 128  # pixels that the tiny base draws; reading its configs would load torch
HUB_ID = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}")
MOST_SETTINGS = 60
PATH_SIGNS = ("/", "\\", "~", "$")


@dataclass(frozen=True)
class Draft:
    """A run that is not started yet. `kind` is "thing" or "style"; `base` what `data.base` of a recipe says; `more`
    are further settings, such as "optim.lr=1e-4". `file`: a recipe that was sent."""

    photos: Path
    kind: str
    noun: str
    base: str
    like: str = ""
    more: tuple[str, ...] = ()
    file: Path | None = None

    @property
    def recipe(self) -> str:
        """The name of the shipped recipe, or the file that was sent in its place."""
        return RECIPES[self.kind] if self.file is None else self.file.as_posix()

    @property
    def run_name(self) -> str:
        """What the run folder and the exported files are called."""
        return re.sub(r"[^\w-]+", "-", self.noun).strip("-_") or "style"

    def settings(self) -> list[str]:
        """key=value for the command line."""
        own = [f"data.photos={self.photos.as_posix()}"]
        own += [f"data.class_noun={self.noun}"] if self.kind == "thing" else []
        own += [f"base.source={self.base}", f"base.like={self.like}"] if self.like else [f"base={self.base}"]
        return [*own, f"run.name={self.run_name}", *self.more]

    def arguments(self) -> list[str]:
        """What follows `finetune train`."""
        return [self.recipe, *self.settings()]

    def command(self) -> str:
        """The command as a person would type it."""
        return shown_command(["train", *self.arguments()])

    def as_yaml(self) -> str:
        """The same as a recipe file."""
        import yaml

        from finetune.config.overrides import overridden, pairs, typed_override
        from finetune.config.recipes import find
        from finetune.core.reading import parse_yaml, read_utf8

        raw = parse_yaml(read_utf8(find(self.recipe)), self.recipe)
        values = overridden(raw, [typed_override(each) for each in pairs(self.settings())])
        return without_places(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def draft_of(values: Mapping[str, Any], photos: Path, bases: Mapping[str, Path], file: Path | None = None) -> Draft:
    """The draft that a page sent.

    Args:
        values: kind, noun, base (tiny, local:NAME or a hub id), like (a hub id) and more (a list of key=value).
        bases: the folders and files that the page may use, by name.
        file: a recipe that was sent.

    Raises:
        BadInput: a value can't be used.
    """
    kind, noun = str(values.get("kind", "thing")), " ".join(str(values.get("noun", "")).split())
    if kind not in RECIPES:
        raise BadInput(f"{kind!r:.40} is neither thing nor style: choose one of them")
    if kind == "thing" and not re.fullmatch(r"[^\W\d_][\w '-]{0,39}", noun):
        raise BadInput("say what is on the photos in a word or two, such as dog or coffee mug")
    like = str(values.get("like", "")).strip()
    if like and not HUB_ID.fullmatch(like):
        raise BadInput(f"{like!r:.80} is not a hub id: write OWNER/NAME")
    given = values.get("more", [])
    more = tuple(_free(text) for text in given if str(text).strip()) if isinstance(given, list) else ()
    if not any(text.startswith("data.masks=") for text in more) and any(photos.glob(f"*{MASK}")):
        more = (*more, "data.masks=auto")
    if len(more) > MOST_SETTINGS:
        raise BadInput(f"these are more than {MOST_SETTINGS} settings: write them into a recipe file")
    thing = noun if kind == "thing" else ""
    base = base_of(values.get("base"), bases)
    return Draft(photos=photos, kind=kind, noun=thing, base=base, like=like, more=more, file=file)


def base_of(name: Any, bases: Mapping[str, Path]) -> str:
    """A base as a recipe names it: tiny, a folder or file that the page may use, or a hub id.

    Raises:
        BadInput: it is something else, such as a path.
    """
    text = str(name or TINY).strip()
    if text == TINY:
        return TINY
    if text.startswith("local:"):
        if text.removeprefix("local:") not in bases:
            raise BadInput("this base is not in the folder of bases: load the page again")
        return bases[text.removeprefix("local:")].as_posix()
    if not HUB_ID.fullmatch(text) or Path(text).exists():
        raise BadInput(f"{without_places(text)!r:.120} is not a hub id: write OWNER/NAME, or choose from the list")
    return text


def bases_in(folder: Path) -> dict[str, Path]:
    """The bases in a folder by name: diffusers folders and single files."""
    if not folder.is_dir():
        return {}
    found = (each for each in sorted(folder.iterdir()) if not each.name.startswith("."))
    return {
        each.name: each for each in found if each.suffix == ".safetensors" or (each / "model_index.json").is_file()
    }


def _free(text: Any) -> str:
    from finetune.ui.settings_list import free_settings

    setting = " ".join(str(text).split())
    key, equals, value = (part.strip() for part in setting.partition("="))
    if not equals or key not in free_settings():
        raise BadInput(f"{setting!r:.80} can't be set here: write section.key=value, such as optim.lr=1e-4")
    if any(sign in value for sign in PATH_SIGNS):
        raise BadInput(f"{setting!r:.80} looks like a path, which the page does not take: use a recipe file for it")
    return f"{key}={value}"
