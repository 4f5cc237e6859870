"""The penalties that priors add to the loss, and their inputs (`finetune.training.priors`).

A penalty is called inside `Step.forward`, so its gradient is synchronised, accumulated and clipped like that of the
loss. Its mean over micro-batches and processes is its value for the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from finetune.core.batch import Batch, Role, picked
from finetune.core.rng import uniform
from finetune.families.base import Family
from finetune.methods.base import Method
from finetune.methods.start import ReferenceModel
from finetune.training.dropout import CurrentSamples
from finetune.training.priors.frozen_base import FrozenBase


@dataclass(frozen=True)
class NoisedBatch:
    """One micro-batch inside a step.

    `latents`: the denoiser's input z_t [B, C, h, w] at timesteps `t` [B]. `weight` [B]: the objective's weight at t
    times the sample's weight. `keep_mask` [encoders, B]: the argument `kept` of `Family.encode_prompts`. `cond`: the
    conditioning tensors of the samples' own prompts, name -> [B, ...]; empty if the step has none.
    """

    batch: Batch
    latents: Tensor
    t: Tensor
    weight: Tensor
    keep_mask: Tensor | None
    current: CurrentSamples = field(default_factory=CurrentSamples)
    cond: Mapping[str, Tensor] = field(default_factory=dict)

    def part(self, rows: Sequence[int]) -> NoisedBatch:
        """The samples with these indices."""
        mask = None if self.keep_mask is None else picked(self.keep_mask.T, rows).T
        return NoisedBatch(
            batch=self.batch.part(rows),
            latents=picked(self.latents, rows),
            t=picked(self.t, rows),
            weight=picked(self.weight, rows),
            keep_mask=mask,
            current=self.current,
            cond={name: picked(value, rows) for name, value in self.cond.items()},
        )


class Regularizer(Protocol):
    def __call__(self, at: NoisedBatch) -> Tensor:
        """A float32 scalar that is added to the loss."""
        ...


class Teacher(Protocol):
    def __call__(self, at: NoisedBatch, target: Tensor) -> Tensor:
        """The target [B, C, h, w] with the samples replaced whose target is another one."""
        ...


@dataclass(frozen=True)
class PriorContext:
    """The inputs for building a penalty. It is built after the method is attached and before a checkpoint is loaded,
    so the weights still have their initial values.

    `class_prompts`: sample name -> class prompt, for samples whose subject has another one than `class_prompt`.
    `plain_captions`: (sample name, caption) -> class prompt, where each caption has its own.
    """

    family: Family
    method: Method
    trained: dict[str, nn.Parameter]
    encode_prompts: Callable[..., dict[str, Tensor]]
    class_prompt: str
    class_prompts: Mapping[str, str] = field(default_factory=dict)
    plain_captions: Mapping[tuple[str, str], str] = field(default_factory=dict)

    @cached_property
    def base(self) -> ReferenceModel:
        """The unchanged base; one for all that ask."""
        return self.method.base_of(self.family)


class KeepPrediction:
    """The penalty of `FrozenBase`."""

    def __init__(self, settings: FrozenBase, attached: PriorContext) -> None:
        self.settings, self.prompt, self.own_prompts = settings, attached.class_prompt, attached.class_prompts
        self.plain = attached.plain_captions
        self.family, self.encode = attached.family, attached.encode_prompts
        self.base: ReferenceModel = attached.base
        self.texts_train = attached.method.trains_texts(attached.family)

    def __call__(self, at: NoisedBatch) -> Tensor:
        """Everything else (`prior.others`) has nothing to do with the class prompt. The mean is over all samples."""
        rows = at.batch.rows_without("other")
        if len(rows) == len(at.batch):
            return self.penalty(at)
        at.current.some = [at.batch.keys[row] for row in rows]
        return self.penalty(at.part(rows)) * (len(rows) / len(at.batch))

    def penalty(self, at: NoisedBatch) -> Tensor:
        """The mean over the samples: a float32 scalar."""
        prompts = self.prompts(at.batch)
        cond = self.encode(prompts, at.keep_mask) | at.batch.conditions
        wanted = self.wanted(at, prompts, cond)
        prediction = self.family.predict(at.latents, at.t, cond, at.batch.geometry).float()
        error = (prediction - wanted).square().flatten(1).mean(1)
        return self.settings.weight * (error * at.weight).mean()

    def prompts(self, batch: Batch) -> list[str]:
        """The class prompt of each sample's subject, or the empty prompt."""
        empty = uniform(batch.keys, "class prompt") < self.settings.caption_dropout
        usual = [self.own_prompts.get(name, self.prompt) for name in batch.names]
        drawn = zip(batch.names, batch.prompts, strict=True)  # a template of several; the first one if it was dropped
        own = [self.plain.get(pair, prompt) for pair, prompt in zip(drawn, usual, strict=True)]
        return ["" if nothing else prompt for nothing, prompt in zip(empty.tolist(), own, strict=True)]

    @torch.no_grad()
    def wanted(self, at: NoisedBatch, prompts: list[str], cond: dict[str, Tensor]) -> Tensor:
        """The unchanged base's prediction, float32, without dropout. If text encoders are trained, the base encodes
        the prompts with its own."""
        with at.current.without_dropout(), self.base() as base:
            own = base.encode_prompts(prompts, at.keep_mask) | at.batch.conditions if self.texts_train else cond
            return base.predict(at.latents, at.t, own, at.batch.geometry).float()


class BaseAsTeacher:
    """The targets of `Others` and `ClassImages` with `target: base`: the frozen base's own predictions, for their own
    captions.

    The loss of these samples is lambda w_t |pred(z_t, t, c) - stop_grad(pred_base(z_t, t, c))|^2. It is the loss of
    `objective.loss` otherwise, and needs no second prediction of the trained model.
    """

    def __init__(self, attached: PriorContext, taught: Sequence[Role]) -> None:
        self.family, self.encode, self.taught = attached.family, attached.encode_prompts, taught
        self.base = attached.base
        self.texts_train = attached.method.trains_texts(attached.family)

    @torch.no_grad()
    def __call__(self, at: NoisedBatch, target: Tensor) -> Tensor:
        rows = sorted(row for role in self.taught for row in at.batch.rows_of(role))
        if not rows:
            return target
        own = at.part(rows)
        with at.current.without_dropout(), self.base() as base:
            cond = dict(own.cond)
            if self.texts_train or not cond:
                encode = base.encode_prompts if self.texts_train else self.encode
                cond = encode(own.batch.prompts, own.keep_mask) | own.batch.conditions
            wanted = base.predict(own.latents, own.t, cond, own.batch.geometry).float()
        taught = dict(zip(rows, wanted.to(target.dtype), strict=True))
        return torch.stack([taught.get(row, values) for row, values in enumerate(target)])
