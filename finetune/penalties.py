"""What is added to the loss so that training keeps the prior without class images: a new kind is one new class here.

A penalty is a function of what a step has at hand, called inside `Step.forward`, so that its gradient is synchronised,
accumulated and clipped as the rest is. Its mean over micro-batches and processes is its value for the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from finetune.batch import Batch
from finetune.draws import uniform
from finetune.dropout import SampleDropout
from finetune.families.base import Family
from finetune.methods.base import Method
from finetune.methods.start import BaseOf
from finetune.settings import Settings


@dataclass(frozen=True)
class Noised:
    """One micro-batch on its way through a step.

    `latents` are what the denoiser reads, z_t [B, C, h, w] at timesteps `t` [B]; `weight` [B] is the objective's at t
    times the sample's; `kept` [encoders, B] as `Family.encode_prompts` takes it.
    """

    batch: Batch
    latents: Tensor
    t: Tensor
    weight: Tensor
    kept: Tensor | None


class Penalty(Protocol):
    def __call__(self, at: Noised) -> Tensor:
        """A float32 scalar that is added to the loss."""
        ...


@dataclass(frozen=True)
class Attached:
    """What a penalty can be made of, once the method is attached and before a checkpoint is read: theta is theta_0.

    `class_prompts` are those of samples (by name) whose subject has another one than `class_prompt`.
    """

    family: Family
    method: Method
    trained: dict[str, nn.Parameter]
    encode_prompts: Callable[..., dict[str, Tensor]]
    class_prompt: str
    class_prompts: Mapping[str, str] = field(default_factory=dict)


class Preserve(Settings):
    """What every kind of `prior:` says of itself. The defaults are those of a kind without a penalty."""

    kind: str

    @property
    def prompts(self) -> list[str]:
        """Templates that are encoded beside the captions; the first is the class prompt."""
        return []

    def penalties(self, attached: Attached) -> list[Penalty]:
        return []

    def cost(self, method: Method, family: Family, class_prompt: str) -> str:
        """One line of the plan; empty for nothing to tell."""
        return ""


class FrozenBase(Preserve):
    """Prior preservation without class images: for the class prompt the trained model is held to what the base says.

    lambda w_t |pred(z_t, t, c_class) - stop_grad(pred_base(z_t, t, c_class))|^2 (2506.06483), at the subject's own
    noised latents. `caption_dropout` empties class prompts, so that the base's empty prompt, and guidance, stay too.
    """

    kind: Literal["frozen_base"] = "frozen_base"
    weight: float = Field(1.0, ge=0)
    prompt: str = "a photo of a {noun}"
    caption_dropout: float = Field(0.25, ge=0, le=1)

    @property
    def prompts(self) -> list[str]:
        return [self.prompt]

    def penalties(self, attached: Attached) -> list[Penalty]:
        return [KeepPrediction(self, attached)]

    def cost(self, method: Method, family: Family, class_prompt: str) -> str:
        extra = _megabytes("a frozen copy of the trained parts", method.copied_bytes(family))
        return f"held to the base's prediction for {class_prompt!r}: a training and a forward pass more a step{extra}"


class Distance(Preserve):
    """lambda sum |theta - theta_0|^2 over the weights of the model (arXiv:2505.19519); for LoRA |s B A|_F^2 by layer.

    A sum and no mean: `weight` means the same whatever the number of weights that are trained.
    """

    kind: Literal["distance"] = "distance"
    weight: float = Field(1e-3, ge=0)

    def penalties(self, attached: Attached) -> list[Penalty]:
        distance = attached.method.distance(attached.family, attached.trained)
        return [lambda at: self.weight * distance()]

    def cost(self, method: Method, family: Family, class_prompt: str) -> str:
        extra = _megabytes("a copy of the weights at the start", method.copied_bytes(family))
        return f"the squared distance of the weights to the base{extra}"


def _megabytes(what: str, size: int) -> str:
    return f", {what} ({size / 1e6:,.0f} MB)" if size else ", nothing is copied"


class KeepPrediction:
    """`FrozenBase` at work."""

    def __init__(self, settings: FrozenBase, attached: Attached) -> None:
        self.settings, self.prompt, self.own_prompts = settings, attached.class_prompt, attached.class_prompts
        self.family, self.encode = attached.family, attached.encode_prompts
        self.base: BaseOf = attached.method.base_of(attached.family)
        self.texts_train = attached.method.trains_texts(attached.family)

    def __call__(self, at: Noised) -> Tensor:
        prompts = self.prompts(at.batch)
        cond = self.encode(prompts, at.kept)
        wanted = self.wanted(at, prompts, cond)
        prediction = self.family.predict(at.latents, at.t, cond, at.batch.geometry).float()
        error = (prediction - wanted).square().flatten(1).mean(1)
        return self.settings.weight * (error * at.weight).mean()

    def prompts(self, batch: Batch) -> list[str]:
        """Each sample's class prompt, which is its own subject's; or the empty one."""
        empty = uniform(batch.draws, "class prompt") < self.settings.caption_dropout
        own = [self.own_prompts.get(name, self.prompt) for name in batch.names]
        return ["" if nothing else prompt for nothing, prompt in zip(empty.tolist(), own, strict=True)]

    @torch.no_grad()
    def wanted(self, at: Noised, prompts: list[str], cond: dict[str, Tensor]) -> Tensor:
        """The base's own prediction, float32, without dropout; its encoders read the prompt where ours are trained."""
        SampleDropout.drawing(None)
        try:
            with self.base() as base:
                own = base.encode_prompts(prompts, at.kept) if self.texts_train else cond
                return base.predict(at.latents, at.t, own, at.batch.geometry).float()
        finally:
            SampleDropout.drawing(at.batch.draws)
