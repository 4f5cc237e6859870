"""What transformers' models record of their inside, when their classes get other names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def keep_recording(renamed: Mapping[str, str]) -> None:
    """transformers finds what a model may record (its hidden states) by the text of its class, which FSDP changes.

    Args:
        renamed: text of a class before -> after.
    """
    try:
        from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY
    except ImportError:  # a version whose models return them by themselves
        return
    registry: dict[Any, Any] = _CAN_RECORD_REGISTRY
    for old, new in renamed.items():
        if dict.__contains__(registry, old):
            dict.__setitem__(registry, new, dict.__getitem__(registry, old))
