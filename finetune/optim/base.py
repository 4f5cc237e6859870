"""The interface of optimisers, and the learning rate as a pure function of the step.

Modules here import torch and the optimisers' libraries only when an optimiser is built, so that recipes can be read
without them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from finetune.core.errors import BadInput
from finetune.core.settings import Settings

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.optim import Optimizer

Beta = Annotated[float, Field(ge=0, lt=1)]
Window = tuple[float, float]  # (start, end) as shares of a run's steps, 0 to 1


WHOLE: Window = (0.0, 1.0)


class Optimiser(Settings):
    """The settings and properties of an optimiser. A new one is a file with a subclass and its `kind`.

    Class attributes:
        state_bytes: bytes of state for each trained parameter.
        averages: whether the exported weights are an average that the optimiser keeps, not the weights in training.
        windows: whether a rate of 0 leaves weights bit-identical, so that some weights can stay fixed for a while.
        shards: whether its steps are right on a part of each weight (`run.shard`): with `any` number of processes;
            with the `same` number after a resume, because its state is in blocks; or `none`, because a step needs all
            weights together.
        whole: why a step needs more than one weight and its gradient at a time, so that weights can't be bf16
            (`run.weights`), as the end of "optim.kind NAME ..."; "" if it does not.
        packages: other packages than torch that compute its steps. A run records their versions.
    """

    state_bytes: ClassVar[float]
    averages: ClassVar[bool] = False
    windows: ClassVar[bool] = True
    shards: ClassVar[Literal["any", "same", "none"]] = "none"
    whole: ClassVar[str] = "may need all weights in a step"
    packages: ClassVar[tuple[str, ...]] = ()
    if TYPE_CHECKING:
        kind: str  # a field of each subclass; as a field here it would come first in recipe.yaml

    lr: float = Field(default=1e-4, gt=0, le=1_000)
    text_lr: float | None = Field(default=None, gt=0, le=1_000)  # None: lr
    max_grad_norm: float = Field(default=1.0, ge=0)  # 0: no clipping
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    schedule_steps: int | None = Field(default=None, ge=1)  # None: run.steps
    warmup: int = Field(default=0, ge=0)  # steps

    def check_device(self, device: str) -> None:
        """Asked before a run writes anything; `device`: torch's type, such as `cuda`.

        Raises:
            BadInput: it does not work there.
        """

    @abstractmethod
    def build(self, trained: Mapping[str, nn.Parameter], windows: Mapping[str, Window] | None = None) -> Optimizer:
        """Builds the torch optimiser for the trained parameters (name -> parameter), in the groups of `groups`.

        Raises:
            BadInput: it needs another device, or a package that is not installed; or it can't use `windows`.
        """

    def try_on(self, device: torch.device | str) -> float:
        """Tests the optimiser on a device: one step from weights of 0 with a gradient of ones. Returns the smallest
        change of a weight.

        Raises:
            BadInput: it needs another device, or a package that is not installed.
        """
        import torch

        parameter = torch.nn.Parameter(torch.zeros(8192, device=device))  # 8-bit states need 4096 values
        optimizer = self.build({"denoiser.x": parameter})
        parameter.sum().backward()
        optimizer.step()
        return float(-parameter.detach().max())

    def to_result(self, optimizer: Any) -> None:
        """Copies the weights for export into the parameters, if the optimiser trains with different ones."""

    def to_training(self, optimizer: Any) -> None:
        """The inverse of `to_result`. It need not be exact: `result_weights` restores the exact values."""

    @contextmanager
    def result_weights(self, optimizer: Any) -> Iterator[None]:
        """Inside the block the parameters hold the weights for export; afterwards their old values, bit for bit."""
        if not self.averages:
            yield
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        kept = [parameter.detach().clone() for parameter in parameters]
        self.to_result(optimizer)
        try:
            yield
        finally:
            self.to_training(optimizer)
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.data.copy_(value)

    def factor(self, step: int, steps: int) -> float:
        """The factor of the learning rate at `step` (from 0) of `steps`: warm-up, then the schedule; at least 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, steps - self.warmup)
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        if self.schedule == "linear":
            return max(0.0, 1 - progress)
        return 1.0

    def steps_within(self, window: Window, steps: int) -> int:
        """How many of a run's `steps` train weights in `window`, up to the end of their schedule if that is 0."""
        first, last = _ends(window, self.schedule_steps or steps)
        goes_on = window[1] == 1 and self.schedule == "constant"
        return max(0, (steps if goes_on else min(steps, last)) - first)

    def factor_within(self, window: Window, step: int, steps: int) -> float:
        """`factor` over the steps of a window (shares of the run), and 0 outside of it. At a rate of 0, AdamW leaves
        weights bit-identical."""
        first, last = _ends(window, steps)
        inside = first <= step < last or (step >= last and window[1] == 1)  # a run that goes on after its schedule
        return self.factor(step - first, last - first) if inside else 0.0

    def set_lr(self, optimizer: Any, step: int, steps: int) -> float:
        """Sets the learning rate of every group for `step`. Returns the rate of the first group, the denoiser's."""
        steps = self.schedule_steps or steps
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * self.factor_within(group["window"], step, steps)
        rate: float = optimizer.param_groups[0]["lr"]
        return rate

    def groups(
        self, trained: Mapping[str, nn.Parameter], windows: Mapping[str, Window] | None = None
    ) -> list[dict[str, Any]]:
        """Parameter groups by part and window, in the order of `trained`. Text encoders may have their own rate.

        Raises:
            BadInput: some weights must stay fixed for a part of the run, which this optimiser can't do.
        """
        if not self.windows and any(window != WHOLE for window in (windows or {}).values()):
            raise BadInput(
                f"optim.kind {getattr(self, 'kind', '')} can't keep some weights fixed for a part of the run, which "
                "method.kind pivotal needs: use optim.kind=adamw"
            )
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


def _ends(window: Window, steps: int) -> tuple[int, int]:
    """The first step of a window of `steps`, from 0, and the one after its last."""
    first, last = (round(share * steps) for share in window)
    return first, last


class Adam(Optimiser):
    """The shared settings of Adam and its variants."""

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)


def not_installed(kind: str, package: str) -> BadInput:
    return BadInput(f"optim.kind is {kind!r}, which needs the package {package}: pip install {package}")
