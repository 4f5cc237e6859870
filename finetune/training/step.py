"""The only training loop. One batch can be read straight through, from latents to the stepped optimiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from finetune.core.batch import Batch
from finetune.core.rng import SampleKey, generator, uniform
from finetune.families.base import Family
from finetune.objectives.base import Objective
from finetune.objectives.loss import per_sample
from finetune.training.dropout import SampleDropout, replace_dropout
from finetune.training.regularizers import NoisedBatch, Regularizer

PromptEncoder = Callable[[Sequence[str], Tensor | None], dict[str, Tensor]]


class MicroBatches(Protocol):
    """Step number and micro-batch number -> this process's batch: a pure function."""

    def micro(self, step: int, index: int) -> Batch: ...


class Step(nn.Module):
    """Latents -> noise -> prediction -> loss, for one micro-batch.

    Only the parts that train are submodules, so that Accelerate wraps, moves and synchronises nothing else.
    """

    def __init__(
        self,
        family: Family,
        trained_parts: Sequence[str],
        objective: Objective,
        encode_prompts: PromptEncoder,
        encoder_dropout: float = 0.0,
        regularizers: Sequence[Regularizer] = (),
    ) -> None:
        super().__init__()
        self.trained = nn.ModuleDict({name: family.parts[name] for name in trained_parts})
        for name, part in self.trained.items():
            replace_dropout(part, name)
        self.family, self.objective, self.encode_prompts = family, objective, encode_prompts
        self.encoder_dropout, self.regularizers = encoder_dropout, regularizers
        self.stratify: int | None = None  # samples of a global batch, to spread them evenly over the timesteps

    def forward(self, batch: Batch) -> Tensor:
        """The mean over the batch of weight * error(prediction, target), and the penalties: a float32 scalar."""
        SampleDropout.drawing(batch.draws)
        x0 = batch.sample_latents()
        noise, added = (value.to(x0.device) for value in self.objective.noises(batch.draws, x0.shape[1:]))
        t = self.objective.timesteps(self.positions(batch.draws)).to(x0.device)
        kept = self.kept(batch.draws)
        cond = self.encode_prompts(batch.prompts, kept)
        noisy = batch.beside(self.objective.add_noise(x0, added, t))
        prediction = self.family.predict(noisy, t, cond, batch.geometry)
        error = per_sample(self.objective.error(prediction.float(), self.objective.target(x0, noise, t)), batch.mask)
        weight = self.objective.weight(t)
        at = NoisedBatch(batch, noisy, t, weight * batch.weight, kept)
        return sum((penalty(at) for penalty in self.regularizers), start=(error * weight * batch.weight).mean())

    def kept(self, draws: list[SampleKey]) -> Tensor | None:
        """[encoders, B]: 0 where a text encoder's output is dropped, on its own (arXiv:2403.03206, 5.2)."""
        if not self.encoder_dropout:
            return None
        each = [uniform(draws, f"text encoder {n}") for n in range(len(self.family.text_encoders))]
        return (torch.stack(each) >= self.encoder_dropout).float()

    def positions(self, draws: list[SampleKey]) -> Tensor:
        """Where in [0, 1) each sample's timestep lies [B]: uniform over the noise levels of the base, or one in each
        of `stratify` equal parts of them."""
        u, share = uniform(draws, "timestep"), self.family.timestep_fraction
        if self.stratify is None:
            return u * share
        order = torch.randperm(self.stratify, generator=generator(draws[0].seed, "strata", draws[0].step))
        return (order[[draw.sample for draw in draws]] + u) / self.stratify * share
