"""Optimisers by kind, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from finetune.core.settings import Settings

if TYPE_CHECKING:
    import torch
    from torch import nn

Window = tuple[float, float]  # from and to, as shares of a run's steps


WHOLE: Window = (0.0, 1.0)


class Optimiser(Settings):
    lr: float = Field(1e-4, gt=0)
    text_lr: float | None = Field(None, gt=0)  # None: lr
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0  # 0: no clipping
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup: int = Field(0, ge=0)  # steps

    def factor(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied by at `step` of `steps`: warm-up, then the schedule, never below 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, steps - self.warmup)
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        if self.schedule == "linear":
            return max(0.0, 1 - progress)
        return 1.0

    def factor_within(self, window: Window, step: int, steps: int) -> float:
        """`factor` over the steps of a window (shares of the run); 0 outside, where AdamW leaves weights as they are,
        bit for bit."""
        first, last = (round(share * steps) for share in window)
        return self.factor(step - first, last - first) if first <= step < last else 0.0

    def set_lr(self, optimizer: torch.optim.Optimizer, step: int, steps: int) -> float:
        """Sets every group's rate for `step`; returns the denoiser's (the first group's)."""
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * self.factor_within(group["window"], step, steps)
        return optimizer.param_groups[0]["lr"]

    def groups(
        self, trained: Mapping[str, nn.Parameter], windows: Mapping[str, Window] | None = None
    ) -> list[dict[str, Any]]:
        """Parameter groups by part and window, in the order of `trained`; text encoders may have their own rate."""
        denoiser = [name for name in trained if name.startswith("denoiser.")]
        text = [name for name in trained if not name.startswith("denoiser.")]
        found: dict[tuple[str, float, Window], list[nn.Parameter]] = {}
        for part, names, rate in (("denoiser", denoiser, self.lr), ("text", text, self.text_lr or self.lr)):
            for name in names:
                found.setdefault((part, rate, (windows or {}).get(name, WHOLE)), []).append(trained[name])
        return [
            {"params": params, "lr": rate, "base_lr": rate, "window": window}
            for (_, rate, window), params in found.items()
        ]
