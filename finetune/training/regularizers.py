"""What priors add to the loss, and what they are given for it (`finetune.training.priors`).

A penalty is a function of what a step has at hand, called inside `Step.forward`, so that its gradient is synchronised,
accumulated and clipped as the rest is. Its mean over micro-batches and processes is its value for the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from finetune.core.batch import Batch
from finetune.core.rng import uniform
from finetune.families.base import Family
from finetune.methods.base import Method
from finetune.methods.start import ReferenceModel
from finetune.training.dropout import CurrentSamples
from finetune.training.priors.frozen_base import FrozenBase


@dataclass(frozen=True)
class NoisedBatch:
    """One micro-batch on its way through a step.

    `latents` are what the denoiser reads, z_t [B, C, h, w] at timesteps `t` [B]; `weight` [B] is the objective's at t
    times the sample's; `keep_mask` [encoders, B] as `Family.encode_prompts` takes it.
    """

    batch: Batch
    latents: Tensor
    t: Tensor
    weight: Tensor
    keep_mask: Tensor | None
    current: CurrentSamples = field(default_factory=CurrentSamples)


class Regularizer(Protocol):
    def __call__(self, at: NoisedBatch) -> Tensor:
        """A float32 scalar that is added to the loss."""
        ...


@dataclass(frozen=True)
class PriorContext:
    """What a penalty can be made of, once the method is attached and before a checkpoint is read: theta is theta_0.

    `class_prompts` are those of samples (by name) whose subject has another one than `class_prompt`.
    """

    family: Family
    method: Method
    trained: dict[str, nn.Parameter]
    encode_prompts: Callable[..., dict[str, Tensor]]
    class_prompt: str
    class_prompts: Mapping[str, str] = field(default_factory=dict)


class KeepPrediction:
    """`FrozenBase` at work."""

    def __init__(self, settings: FrozenBase, attached: PriorContext) -> None:
        self.settings, self.prompt, self.own_prompts = settings, attached.class_prompt, attached.class_prompts
        self.family, self.encode = attached.family, attached.encode_prompts
        self.base: ReferenceModel = attached.method.base_of(attached.family)
        self.texts_train = attached.method.trains_texts(attached.family)

    def __call__(self, at: NoisedBatch) -> Tensor:
        prompts = self.prompts(at.batch)
        cond = self.encode(prompts, at.keep_mask) | at.batch.conditions
        wanted = self.wanted(at, prompts, cond)
        prediction = self.family.predict(at.latents, at.t, cond, at.batch.geometry).float()
        error = (prediction - wanted).square().flatten(1).mean(1)
        return self.settings.weight * (error * at.weight).mean()

    def prompts(self, batch: Batch) -> list[str]:
        """Each sample's class prompt, which is its own subject's; or the empty one."""
        empty = uniform(batch.keys, "class prompt") < self.settings.caption_dropout
        own = [self.own_prompts.get(name, self.prompt) for name in batch.names]
        return ["" if nothing else prompt for nothing, prompt in zip(empty.tolist(), own, strict=True)]

    @torch.no_grad()
    def wanted(self, at: NoisedBatch, prompts: list[str], cond: dict[str, Tensor]) -> Tensor:
        """The base's own prediction, float32, without dropout; its encoders read the prompt where ours are trained."""
        with at.current.without_dropout(), self.base() as base:
            own = base.encode_prompts(prompts, at.keep_mask) | at.batch.conditions if self.texts_train else cond
            return base.predict(at.latents, at.t, own, at.batch.geometry).float()
