"""Training methods. Every module here that defines a `Method` with a `kind` is one: a new method is one new file."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from finetune.core.registry import Registry
from finetune.methods.base import Method

METHODS: Registry[Method] = Registry(Method, "finetune.methods", lambda item: item.model_fields["kind"].default)


# the type of a recipe's `method:` section: `kind` chooses the class
if TYPE_CHECKING:
    MethodSettings = Method
else:
    MethodSettings = Annotated[reduce(or_, METHODS.values()), Field(discriminator="kind")]
