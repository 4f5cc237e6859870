"""Finds recipes: shipped ones by name, and files by path."""

from __future__ import annotations

import difflib
from pathlib import Path

from finetune.core.errors import BadInput


def folder() -> Path:
    """The folder of the shipped recipes: beside the package in a checkout, inside the package in a wheel."""
    inside = Path(__file__).parents[1] / "_recipes"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"


def examples() -> Path:
    """The folder of the example photos: beside the package in a checkout, inside the package in a wheel."""
    inside = Path(__file__).parents[1] / "_examples"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "examples"


def names() -> list[str]:
    """Returns the names of the shipped recipes, sorted."""
    return sorted(file.stem for file in folder().glob("*.yaml"))


def find(source: str) -> Path:
    """Returns the file of a recipe, given its path or a shipped recipe's name.

    Raises:
        BadInput: there is neither such a file nor such a recipe; the message suggests the nearest name.
    """
    if not source or "\0" in source:
        raise BadInput(f"there is no recipe {source!r}: shipped are {', '.join(names())}")
    path = Path(source).expanduser()
    if path.is_file():
        return path
    shipped = folder() / f"{source}.yaml"
    if shipped.is_file():
        return shipped
    if path.is_dir():
        raise BadInput(
            f"{source!r} is a folder and no recipe: train on its photos with `finetune dreambooth FOLDER --class-noun "
            "NOUN`, or go on with a run with `finetune resume RUN`"
        )
    nearest = difflib.get_close_matches(source, names(), n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"shipped are {', '.join(names())}"
    raise BadInput(f"there is no recipe {source!r}, neither a file nor a shipped one; {hint}")


def summary(path: Path) -> str:
    """Returns what a recipe is for: the second comment line in the file, or an empty text."""
    lines = [
        line.removeprefix("#").strip()
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("#")
    ]
    return lines[1] if len(lines) > 1 else ""
