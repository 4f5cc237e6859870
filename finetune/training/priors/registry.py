"""Priors. Every module here that defines a `PriorSettings` with a `kind` is one: a new prior is one new file."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from finetune.core.registry import Registry
from finetune.training.priors.base import PriorSettings

PRIORS: Registry[PriorSettings] = Registry(
    PriorSettings, "finetune.training.priors", lambda item: item.model_fields["kind"].default
)


# the type of a recipe's `prior:` section: `kind` chooses the class
if TYPE_CHECKING:
    Prior = PriorSettings
else:
    Prior = Annotated[reduce(or_, PRIORS.values()), Field(discriminator="kind")]
