"""Prodigy from prodigyopt: AdamW that estimates its own learning rate."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from finetune.optim.base import Adam, Window, not_installed

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class Prodigy(Adam):
    """Prodigy (arXiv:2306.06101). It estimates one rate d for all trained weights; `lr` multiplies d."""

    state_bytes: ClassVar[float] = 16.0  # two moments, and the initial weights and s of its estimate
    packages: ClassVar[tuple[str, ...]] = ("prodigyopt",)
    whole: ClassVar[str] = "estimates one rate from all weights together"
    windows: ClassVar[bool] = False  # its single rate also changes groups whose rate is set to 0
    kind: Literal["prodigy"] = "prodigy"
    lr: float = Field(default=1.0, gt=0, le=1_000)
    d0: float = Field(default=1e-6, gt=0)  # the initial estimate
    d_coef: float = Field(default=1.0, gt=0)  # a factor for the estimate
    bias_correction: bool = False

    @field_validator("text_lr")
    @classmethod
    def _one_rate(cls, value: float | None) -> float | None:
        if value is not None:
            raise ValueError("prodigy has one rate for all trained weights: leave optim.text_lr out")
        return value

    def build(self, trained: Mapping[str, nn.Parameter], windows: Mapping[str, Window] | None = None) -> Optimizer:
        try:
            import prodigyopt
        except ImportError as error:
            raise not_installed(self.kind, "prodigyopt") from error
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a line about weight decay
            optimizer: Optimizer = prodigyopt.Prodigy(
                self.groups(trained, windows),
                lr=self.lr,
                betas=self.betas,
                eps=self.eps,
                weight_decay=self.weight_decay,
                d0=self.d0,
                d_coef=self.d_coef,
                use_bias_correction=self.bias_correction,
                safeguard_warmup=self.warmup > 0,
            )
        return optimizer

    def set_lr(self, optimizer: Any, step: int, steps: int) -> float:
        """Sets the groups' rates as other optimisers do. Returns the effective rate from the estimate, for the log."""
        estimate: float = optimizer.param_groups[0]["d"]
        return super().set_lr(optimizer, step, steps) * estimate
