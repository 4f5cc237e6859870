"""One training step: from a batch of latents to the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from finetune.core.batch import Batch
from finetune.core.rng import SampleKey, generator, uniform
from finetune.data.cache import PromptCache
from finetune.families.base import Family
from finetune.objectives.base import Objective
from finetune.objectives.loss import per_sample
from finetune.training.dropout import CurrentSamples, replace_dropout
from finetune.training.parcel import with_tensors
from finetune.training.regularizers import NoisedBatch, Regularizer, Teacher

PromptEncoder = Callable[[Sequence[str], Tensor | None], dict[str, Tensor]]


class MicroBatches(Protocol):
    """The source of training batches."""

    def micro(self, step: int, index: int) -> Batch:
        """This process's micro-batch number `index` of step `step`, both from 0. It must be a pure function."""
        ...


@dataclass(frozen=True)
class StepOptions:
    """Options of a training step.

    Attributes:
        encoder_dropout: the probability of setting a text encoder's output to zero (arXiv:2403.03206 section 5.2).
        regularizers: penalties that are added to the loss of every micro-batch.
        stratify: the number of samples in a global batch, whose timesteps are spread evenly; None: drawn
            independently.
        teacher: gives some samples another target than their image; None for none.
    """

    encoder_dropout: float = 0.0
    regularizers: Sequence[Regularizer] = ()
    stratify: int | None = None
    teacher: Teacher | None = None


@dataclass(frozen=True)
class Draws:
    """The random numbers of one micro-batch: functions of its keys, made on the CPU.

    `latent_noise` [B, C, h, w]: of the latents' distribution. `noise` and `added` [B, C, h, w]: for the target and for
    the denoiser's input, often the same tensor. `t` [B]: timesteps. `keep_mask`: as `Step.keep_mask`.
    """

    latent_noise: Tensor
    noise: Tensor
    added: Tensor
    t: Tensor
    keep_mask: Tensor | None


@dataclass(frozen=True)
class StepInputs:
    """Everything of a micro-batch that a step computes with.

    `texts`: each text encoder's outputs for the prompts, name -> [B, ...]; None: the step asks for them itself.
    """

    batch: Batch
    draws: Draws
    texts: list[dict[str, Tensor]] | None = None

    def anonymous(self) -> StepInputs:
        """The tensors alone: without prompts, sizes, keys, names and roles."""
        return replace(
            self, texts=None, batch=replace(self.batch, prompts=[], geometry=[], keys=[], names=[], roles=[])
        )


class Step(nn.Module):
    """The loss of one micro-batch: adds noise to latents, predicts, and compares.

    Only the trained parts are submodules, so that Accelerate wraps, moves and synchronises nothing else.

    Args:
        family: the base with the method attached.
        trained_parts: the names of the parts that are trained.
        objective: timesteps, noise, target and loss weights.
        encode_prompts: B prompts and a mask [encoders, B] (or None) -> conditioning tensors, as
            `Family.encode_prompts`.
        options: dropout, penalties and stratification.
    """

    def __init__(
        self,
        family: Family,
        trained_parts: Sequence[str],
        objective: Objective,
        encode_prompts: PromptEncoder,
        options: StepOptions | None = None,
    ) -> None:
        super().__init__()
        self.trained = nn.ModuleDict({name: family.parts[name] for name in trained_parts})
        self.current = CurrentSamples()
        for name, part in self.trained.items():
            replace_dropout(part, name, self.current)
        self.family, self.objective, self.encode_prompts = family, objective, encode_prompts
        self.options = options or StepOptions()
        self.computed: Callable[[StepInputs, dict[str, Tensor]], Tensor] = self.loss  # or what gives the same faster

    def move_to(self, device: torch.device) -> None:
        """Moves the trained parts and the objective's tables to `device`."""
        self.to(device)
        self.objective = self.objective.to(device)

    def inputs(self, batch: Batch, with_texts: bool = False) -> StepInputs:
        """All that is drawn for a batch, on the CPU: `forward` then moves nothing to the device.

        `with_texts`: cached prompts are read now, from the disk if they are many.
        """
        sizes = self.family.size_conditions(batch.geometry)
        encode = self.encode_prompts
        texts = encode.stored(batch.prompts) if with_texts and isinstance(encode, PromptCache) else None
        return StepInputs(replace(batch, conditions=batch.conditions | sizes), self.draw(batch), texts)

    def draw(self, batch: Batch) -> Draws:
        """The random numbers of a batch."""
        noise, added = self.objective.noises(batch.keys, batch.latents.mean.shape[1:])
        return Draws(batch.latent_noise(), noise, added, self.timesteps(batch.keys), self.keep_mask(batch.keys))

    def forward(
        self, batch: Batch, draws: Draws | None = None, texts: list[dict[str, Tensor]] | None = None
    ) -> Tensor:
        """The mean over the batch of weight * error(prediction, target), plus the regularizers: a float32 scalar.

        `draws` and `texts`: those of the batch (see `StepInputs`), on its device; None: they are made here.
        """
        self.current.keys = batch.keys
        if draws is None:
            draws = with_tensors(self.draw(batch), lambda value: value.to(batch.latents.mean.device))
        if texts is None:
            cond = self.encode_prompts(batch.prompts, draws.keep_mask)
        else:
            cond = self.family.join_texts(texts, draws.keep_mask)
        cond = cond | batch.conditions
        return self.computed(StepInputs(batch, draws), cond)

    def loss(self, inputs: StepInputs, cond: dict[str, Tensor]) -> Tensor:
        """The loss for the conditioning tensors `cond`. Without penalties, teacher and dropout it reads tensors that
        are given and nothing else, so that a recording of it serves every step of the same shapes."""
        batch, draws = inputs.batch, inputs.draws
        x0, t = batch.sample_latents(draws.latent_noise), draws.t
        noisy = batch.concat_conditioning(self.objective.add_noise(x0, draws.added, t))
        prediction = self.family.predict(noisy, t, cond, batch.geometry)
        weight = self.objective.weight(t)
        at = NoisedBatch(batch, noisy, t, weight * batch.weight, draws.keep_mask, current=self.current, cond=cond)
        target = self.objective.target(x0, draws.noise, t)
        if self.options.teacher is not None:
            target = self.options.teacher(at, target)
        error = per_sample(self.objective.error(prediction.float(), target), batch.mask)
        extra = (regularizer(at) for regularizer in self.options.regularizers)
        return sum(extra, start=(error * weight * batch.weight).mean())

    def keep_mask(self, keys: list[SampleKey]) -> Tensor | None:
        """[encoders, B]: 0 where a text encoder's output is dropped, 1 elsewhere; None without dropout. Each encoder
        is dropped independently (arXiv:2403.03206 section 5.2)."""
        if not self.options.encoder_dropout:
            return None
        each = [uniform(keys, f"text encoder {n}") for n in range(len(self.family.text_encoders))]
        return (torch.stack(each) >= self.options.encoder_dropout).float()

    def positions(self, keys: list[SampleKey]) -> Tensor:
        """Uniform numbers [B] in [0, 1), one for each sample's timestep. With `stratify`, each equal part of the
        range gets one sample of the global batch."""
        u = uniform(keys, "timestep")
        if self.options.stratify is None:
            return u
        order = torch.randperm(self.options.stratify, generator=generator(keys[0].seed, "strata", keys[0].step))
        return (order[[key.sample for key in keys]] + u) / self.options.stratify

    def timesteps(self, keys: list[SampleKey]) -> Tensor:
        """The timesteps [B] of samples: by the recipe's density, over the noise levels that the base knows."""
        return self.objective.timesteps(self.positions(keys), self.family.timestep_fraction)


def parts_of(trained: Iterable[str]) -> list[str]:
    """The parts that these parameter names belong to: "denoiser.conv_in.weight" belongs to "denoiser"."""
    return list(dict.fromkeys(name.split(".", 1)[0] for name in trained))
