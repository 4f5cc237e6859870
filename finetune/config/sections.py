"""What the sections of a recipe may hold, read from its types."""

from __future__ import annotations

from typing import Any

from finetune.core.settings import Settings


def is_in(key: str, section: str) -> bool:
    """Whether a setting such as "optim.lr" is the section or setting `section`, or lies in it."""
    return f"{key}.".startswith(f"{section}.")


def sections_at(model: Any, name: str) -> list[type[Settings]]:
    """The section classes that `model.name` may hold."""
    field = model.model_fields.get(name)
    if field is None:
        return []
    candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
    return [c for c in candidates if isinstance(c, type) and issubclass(c, Settings)]
