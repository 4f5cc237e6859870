"""Training methods. Every module here that defines a `Method` with a `kind` is one: a new method is one new file."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import reduce
from operator import or_
from typing import Annotated, Any

from pydantic import Field

from finetune.methods.base import Method


def _discover() -> dict[str, type[Method]]:
    found: dict[str, type[Method]] = {}
    for module in pkgutil.iter_modules(__path__):
        for item in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if inspect.isclass(item) and issubclass(item, Method) and not inspect.isabstract(item):
                found[item.model_fields["kind"].default] = item
    return dict(sorted(found.items()))


REGISTRY: dict[str, type[Method]] = _discover()

# what a recipe's `method:` section may be: `kind` chooses the class
MethodSettings: Any = Annotated[reduce(or_, REGISTRY.values()), Field(discriminator="kind")]
