"""Optimisers. Every module here that defines an `Optimiser` with a `kind` is one: a new optimiser is one new file."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from finetune.core.registry import Registry
from finetune.optim.base import Optimiser

OPTIMISERS: Registry[Optimiser] = Registry(Optimiser, "finetune.optim", lambda item: item.model_fields["kind"].default)


# the type of a recipe's `optim:` section: `kind` chooses the class
if TYPE_CHECKING:
    Optim = Optimiser
else:
    Optim = Annotated[reduce(or_, OPTIMISERS.values()), Field(discriminator="kind")]
