"""The inputs of the predictions that verdicts compare, and how they are predicted without a trace in the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch
from torch import Tensor

from finetune.core.batch import Batch, Geometry
from finetune.core.rng import SampleKey, normal
from finetune.families.base import Family
from finetune.objectives.base import Objective
from finetune.objectives.loss import per_sample
from finetune.sampling.draw import as_drawn


@dataclass(frozen=True)
class Point:
    """One prediction's input, on the CPU, without a batch dimension.

    `noisy` [C, h, w], or [C + E, h, w] with the extra channels of the base; `t`: a scalar. `target` [C, h, w] is what
    training wants the model to return, and `mask` [1, h, w] the weight of each latent; both only for photos.
    """

    noisy: Tensor
    t: Tensor
    prompt: str
    geometry: Geometry
    conditions: dict[str, Tensor] = field(default_factory=dict)
    target: Tensor | None = None
    mask: Tensor | None = None


PointSet = Sequence[Point]
Predict = Callable[[PointSet], list[Tensor]]  # points -> the model's output at each: [C, h, w], float32, on the CPU


def asked(points: PointSet, prompts: Sequence[str]) -> list[Point]:
    """The same points with other prompts, which are repeated in turn."""
    return [replace(point, prompt=prompts[number % len(prompts)]) for number, point in enumerate(points)]


class Predictor:
    """Predicts at points with the weights that the family holds now.

    It uses no random numbers, no dropout and no gradient, and gives every module its mode back: a run goes on as if it
    had not been called.

    Args:
        family: the base with the method attached.
        encode_prompts: as `Step`'s: prompts -> conditioning tensors.
        batch_size: the largest number of points that are predicted together.
    """

    def __init__(
        self,
        family: Family,
        encode_prompts: Callable[[Sequence[str], Tensor | None], dict[str, Tensor]],
        batch_size: int,
    ) -> None:
        self.family, self.encode_prompts, self.batch_size = family, encode_prompts, batch_size

    @torch.no_grad()
    def __call__(self, points: PointSet) -> list[Tensor]:
        found: list[Tensor] = []
        with as_drawn(self.family):
            for group in _groups(points, self.batch_size):
                found += self._predict(group)
        return found

    def _predict(self, points: list[Point]) -> list[Tensor]:
        device = self.family.device
        cond = self.encode_prompts([point.prompt for point in points], None)
        for name in points[0].conditions:
            cond[name] = torch.stack([point.conditions[name] for point in points]).to(device)
        noisy, t = (torch.stack(each).to(device) for each in zip(*[(p.noisy, p.t) for p in points], strict=True))
        output = self.family.predict(noisy, t, cond, [point.geometry for point in points])
        return list(output.float().cpu())


def _groups(points: PointSet, size: int) -> Iterator[list[Point]]:
    """Neighbours of the same shape, at most `size` together."""
    for _, group in groupby(points, lambda point: (point.noisy.shape, sorted(point.conditions))):
        alike = list(group)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def of_batch(batch: Batch, objective: Objective, u: Tensor, keys: Sequence[SampleKey]) -> list[Point]:
    """The samples of a batch with noise as points.

    Args:
        batch: B samples.
        objective: adds the noise, and says what the model should return.
        u: [B], from 0 to 1: the timesteps by the objective's density.
        keys: B positions, which decide the noise.
    """
    x0 = batch.sample_latents()
    noise = normal(keys, x0.shape[1:], "verdict")
    t = objective.timesteps(u)
    noisy, target = batch.concat_conditioning(objective.add_noise(x0, noise, t)), objective.target(x0, noise, t)
    return [
        Point(
            noisy[n],
            t[n],
            batch.prompts[n],
            batch.geometry[n],
            conditions={name: value[n] for name, value in batch.conditions.items()},
            target=target[n],
            mask=None if batch.mask is None else batch.mask[n],
        )
        for n in range(len(batch))
    ]


def loss(points: PointSet, outputs: Sequence[Tensor]) -> float:
    """The mean squared error of outputs at photos, which training wants to be small."""
    errors = []
    for point, output in zip(points, outputs, strict=True):
        assert point.target is not None
        mask = None if point.mask is None else point.mask[None]
        errors.append(float(per_sample((output - point.target).square()[None], mask)))
    return sum(errors) / len(errors)


def squared_distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The mean over points of the mean squared difference."""
    return sum(float((a - b).square().mean()) for a, b in zip(one, other, strict=True)) / len(one)
