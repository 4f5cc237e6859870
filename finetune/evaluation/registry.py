"""Metrics and backbones. A new one is one new file in `metrics` or `backbones`; a new backbone also needs an option in
`finetune.cli.evaluate`."""

from __future__ import annotations

from finetune.core.errors import BadInput
from finetune.core.registry import Registry
from finetune.evaluation.backbones.base import Backbone
from finetune.evaluation.base import Kind, Metric

METRICS: Registry[Metric] = Registry(Metric, "finetune.evaluation.metrics", lambda item: item.name)
BACKBONES: Registry[Backbone] = Registry(Backbone, "finetune.evaluation.backbones", lambda item: item.kind)


def chosen_metrics(names: str | None, kind: Kind, given: set[str]) -> list[Metric]:
    """The metrics of `--metrics a,b`, in that order. Without names: the default ones for this kind, and those whose
    backbone was `given` (kinds of backbones).

    Raises:
        BadInput: there is no such metric.
    """
    if names is None:
        fitting = [item for item in METRICS.values() if kind in item.for_kinds]
        chosen = [item for item in fitting if item.default or item.backbone in given]
        return [item() for item in sorted(chosen, key=lambda item: item.place)]
    asked = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    unknown = next((name for name in asked if name not in METRICS), None)
    if unknown is not None or not asked:
        raise BadInput(f"there is no metric {(unknown or '')!r}: give some of {', '.join(METRICS)}, with commas")
    return [METRICS[name]() for name in asked]
