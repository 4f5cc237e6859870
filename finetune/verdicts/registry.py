"""The measures. Every module in `measures/` that defines a `Measure` is one: a new measure is one new file."""

from __future__ import annotations

from finetune.core.registry import Registry
from finetune.verdicts.base import Measure

MEASURES: Registry[Measure] = Registry(Measure, "finetune.verdicts.measures", lambda item: item.name)
