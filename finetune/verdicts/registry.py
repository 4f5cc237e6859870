"""The measures. Every module in `measures/` that defines a `Number` is one: a new measure is one new file."""

from __future__ import annotations

from finetune.core.registry import Registry
from finetune.verdicts.base import Number

MEASURES: Registry[Number] = Registry(Number, "finetune.verdicts.measures", lambda item: item.name)
