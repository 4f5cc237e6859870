"""What an optimiser is to the loop, and the learning rate as a pure function of the step.

No module here imports torch or an optimiser's library before an optimiser is built: recipes are read without them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from finetune.core.errors import BadInput
from finetune.core.settings import Settings

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.optim import Optimizer

Window = tuple[float, float]  # from and to, as shares of a run's steps


WHOLE: Window = (0.0, 1.0)


class Optimiser(Settings):
    """Settings of an optimiser, and what is particular about it. A new one is a file with a subclass and its `kind`.

    Class attributes:
        state_bytes: bytes of its state for each trained parameter.
        averages: the weights that leave the run are an average of its own, and not those that it trains with.
        windows: a rate of 0 leaves weights as they are, bit for bit, so that a part of them can rest.
        packages: distributions that compute its steps besides torch: a run records their versions.
    """

    state_bytes: ClassVar[float]
    averages: ClassVar[bool] = False
    windows: ClassVar[bool] = True
    packages: ClassVar[tuple[str, ...]] = ()
    if TYPE_CHECKING:
        kind: str  # a field of each subclass; as a field here it would come first in recipe.yaml

    lr: float = Field(default=1e-4, gt=0)
    text_lr: float | None = Field(default=None, gt=0)  # None: lr
    max_grad_norm: float = 1.0  # 0: no clipping
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    schedule_steps: int | None = Field(default=None, ge=1)  # None: run.steps
    warmup: int = Field(default=0, ge=0)  # steps

    @abstractmethod
    def build(self, trained: Mapping[str, nn.Parameter], windows: Mapping[str, Window] | None = None) -> Optimizer:
        """The optimiser of the trained parameters, over `groups`."""

    def try_on(self, device: torch.device | str) -> float:
        """Builds it over zeros on a device, makes one step along a gradient of ones, and returns the least that a
        weight was moved by.

        Raises:
            BadInput: it needs another device, or a package that is not here.
        """
        import torch

        parameter = torch.nn.Parameter(torch.zeros(8192, device=device))  # 8-bit states begin at 4096 values
        optimizer = self.build({"denoiser.x": parameter})
        parameter.sum().backward()
        optimizer.step()
        return float(-parameter.detach().max())

    def to_result(self, optimizer: Any) -> None:
        """Puts the weights that leave the run into the parameters, where the optimiser has others to train with."""

    def to_training(self, optimizer: Any) -> None:
        """The inverse of `to_result`; it need not be exact, the caller puts the bits back."""

    @contextmanager
    def result_weights(self, optimizer: Any) -> Iterator[None]:
        """Inside the block the parameters are what would leave the run; afterwards what they were, bit for bit."""
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
        inside = first <= step < last or (step >= last and window[1] == 1)  # a run that goes on after its schedule
        return self.factor(step - first, last - first) if inside else 0.0

    def set_lr(self, optimizer: Any, step: int, steps: int) -> float:
        """Sets every group's rate for `step` of a run of `steps`; returns the denoiser's (the first group's)."""
        steps = self.schedule_steps or steps
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * self.factor_within(group["window"], step, steps)
        rate: float = optimizer.param_groups[0]["lr"]
        return rate

    def groups(
        self, trained: Mapping[str, nn.Parameter], windows: Mapping[str, Window] | None = None
    ) -> list[dict[str, Any]]:
        """Parameter groups by part and window, in the order of `trained`; text encoders may have their own rate.

        Raises:
            BadInput: a part is to rest, which this optimiser can't let it do.
        """
        if not self.windows and any(window != WHOLE for window in (windows or {}).values()):
            raise BadInput(
                f"optim.kind {getattr(self, 'kind', '')} moves weights that should rest, as method.kind pivotal wants "
                "it of some: use optim.kind=adamw"
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


class Adam(Optimiser):
    """What all of Adam's kin are set by."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01


def not_installed(kind: str, package: str) -> BadInput:
    return BadInput(f"optim.kind is {kind!r}, which needs the package {package}: pip install {package}")
