"""Schedule-free AdamW from schedulefree: it averages the weights instead of using a schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import field_validator

from finetune.optim.base import Adam, Window, not_installed

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class ScheduleFree(Adam):
    """Schedule-free AdamW (arXiv:2405.15682). It trains at a point between the weights and their average, and exports
    the average."""

    state_bytes: ClassVar[float] = 8.0
    shards: ClassVar[Literal["any", "same", "none"]] = "any"
    packages: ClassVar[tuple[str, ...]] = ("schedulefree",)
    whole: ClassVar[str] = "reads its average back from the trained weights, which rounding would change"
    averages: ClassVar[bool] = True
    windows: ClassVar[bool] = False  # the average changes even if the rate is 0
    kind: Literal["schedule_free"] = "schedule_free"

    @field_validator("schedule")
    @classmethod
    def _no_schedule(cls, value: str) -> str:
        if value != "constant":
            raise ValueError("schedule_free replaces the learning-rate schedule: leave optim.schedule out")
        return value

    @field_validator("betas")
    @classmethod
    def _some_average(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not value[0] > 0:
            raise ValueError("schedule_free's first beta must be above 0, such as 0.9")
        return value

    def build(self, trained: Mapping[str, nn.Parameter], windows: Mapping[str, Window] | None = None) -> Optimizer:
        try:
            import schedulefree
        except ImportError as error:
            raise not_installed(self.kind, "schedulefree") from error
        optimizer = schedulefree.AdamWScheduleFree(
            self.groups(trained, windows),
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
        )
        optimizer.train()
        built: Optimizer = optimizer
        return built

    def to_result(self, optimizer: Any) -> None:
        optimizer.eval()

    def to_training(self, optimizer: Any) -> None:
        optimizer.train()
