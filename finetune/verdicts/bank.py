"""Noisy latents on the way of a base's own drawing: where its predictions are asked again during training.

For each prompt the base begins to draw, in DDIM steps (arXiv:2010.02502 eq. 12 without noise; for flows, Euler's
method), and the latents before the first steps are kept. There an image's content is decided; later, prompts do
little, and a change of the grain hides all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from finetune.core.batch import Geometry
from finetune.core.rng import generator
from finetune.data.entries import load_entry, save_entry
from finetune.objectives.base import Objective
from finetune.verdicts.points import Point, Predict

STEPS = 5  # of a whole drawing
LEVELS = 2  # of these, the latents before the first ones are kept: pure noise, and what is .8 of the way to it
GUIDANCE = 3.0  # below what images are drawn with, so that few steps do not overshoot
VERSION = 1  # of what a stored drawing depends on, beside its key


@dataclass(frozen=True)
class Canvas:
    """How the base draws: latents of `shape` [C, h, w] of square images of `side` pixels.

    `objective`: of the base, with its default settings, on the CPU. `share`: the share of the noise levels that the
    base knows (`Family.timestep_fraction`).
    """

    shape: tuple[int, int, int]
    side: int
    objective: Objective
    share: float = 1.0

    @property
    def geometry(self) -> Geometry:
        return Geometry((self.side, self.side), (0, 0), (self.side, self.side))

    @property
    def timesteps(self) -> Tensor:
        """[LEVELS], from the most noise to the least."""
        return self.objective.timesteps((1 - torch.arange(LEVELS) / STEPS) * self.share)


class Bank:
    """Drawings by the base, stored under a hash of what they were drawn from.

    Args:
        predict: predicts as the base does: before training.
        canvas: how it draws.
        made_by: names the base and its precision.
        folder: where drawings are stored.
    """

    def __init__(self, predict: Predict, canvas: Canvas, made_by: str, folder: Path) -> None:
        self.predict, self.canvas, self.made_by, self.folder = predict, canvas, made_by, folder / "verdicts"

    def drawings(self, prompts: Sequence[str]) -> list[list[Point]]:
        """The points of one drawing for each prompt, from the most noise to the least. A prompt that comes again is
        drawn with other noise."""
        numbers = [list(prompts[:index]).count(prompt) for index, prompt in enumerate(prompts)]
        wanted = list(zip(prompts, numbers, strict=True))
        stored = {pair: self._stored(*pair) for pair in wanted}
        missing = [pair for pair, latents in stored.items() if latents is None]
        for pair, latents in zip(missing, self._draw(missing), strict=True):
            stored[pair] = latents
            save_entry(self.folder, self._source(*pair), {"latents": latents})
        return [self._points(pair[0], stored[pair]) for pair in wanted]

    def _source(self, prompt: str, number: int) -> str:
        parts = (VERSION, self.made_by, self.canvas.shape, self.canvas.side, STEPS, LEVELS, GUIDANCE, number, prompt)
        return "\n".join(map(str, parts))

    def _stored(self, prompt: str, number: int) -> Tensor | None:
        tensors = load_entry(self.folder, self._source(prompt, number))
        wanted = (LEVELS, *self.canvas.shape)
        return tensors["latents"] if tensors and tensors["latents"].shape == wanted else None

    def _points(self, prompt: str, latents: Tensor | None) -> list[Point]:
        assert latents is not None
        return [
            Point(noisy, t, prompt, self.canvas.geometry)
            for noisy, t in zip(latents, self.canvas.timesteps, strict=True)
        ]

    def _draw(self, pairs: Sequence[tuple[str, int]]) -> list[Tensor]:
        """[LEVELS, C, h, w] for each (prompt, number)."""
        if not pairs:
            return []
        canvas, times = self.canvas, self.canvas.timesteps
        noise = torch.stack([_noise(prompt, number, canvas.shape) for prompt, number in pairs])
        t = times[:1].expand(len(pairs))
        noisy = canvas.objective.add_noise(torch.zeros_like(noise), noise, t)
        kept = [noisy]
        for level in range(LEVELS - 1):
            noisy = self._next([prompt for prompt, _ in pairs], noisy, times[level], times[level + 1])
            kept.append(noisy)
        return list(torch.stack(kept, dim=1))

    def _next(self, prompts: Sequence[str], noisy: Tensor, now: Tensor, after: Tensor) -> Tensor:
        """One DDIM step of guided drawing (arXiv:2207.12598 eq. 6), from timestep `now` to `after`."""
        objective, count, place = self.canvas.objective, len(prompts), self.canvas.geometry
        each = [*prompts, *[""] * count]
        outputs = self.predict([Point(noisy[n % count], now, text, place) for n, text in enumerate(each)])
        with_prompt, without = torch.stack(outputs[:count]), torch.stack(outputs[count:])
        output = without + GUIDANCE * (with_prompt - without)
        t = now.expand(count)
        x0 = objective.clean(noisy, output, t)
        none = torch.zeros_like(x0)
        noise = (noisy - objective.add_noise(x0, none, t)) / objective.add_noise(none, torch.ones_like(x0), t)
        return objective.add_noise(x0, noise, after.expand(count))


def _noise(prompt: str, number: int, shape: Sequence[int]) -> Tensor:
    return torch.randn(tuple(shape), generator=generator(0, f"verdict drawing {prompt}", number))
