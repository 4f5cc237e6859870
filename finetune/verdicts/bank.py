"""Latents of a base's own drawings: where its predictions are asked again during training.

For each prompt the base draws in DDIM steps (arXiv:2010.02502 eq. 12 without noise; for flows, Euler's method). Of a
drawing's beginning the latents before the first steps are kept: there an image's content is decided; later, a change
of the grain hides all others. Of a whole drawing the image is kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
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
WHOLE = 10  # steps of a drawing whose image is kept
VERSION = 1  # of what a stored drawing depends on, beside its key


NumberedPrompt = tuple[str, int]  # a prompt, and how often it came before
Way = tuple[int, int | str]  # the steps of a drawing, and what is kept of it
Draw = Callable[[Sequence[NumberedPrompt]], list[Tensor]]


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
        return self.times(STEPS)[:LEVELS]

    def times(self, steps: int) -> Tensor:
        """[steps] timesteps before the steps of a drawing."""
        return self.objective.timesteps((1 - torch.arange(steps) / steps) * self.share)


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
        kept = self._kept(prompts, (STEPS, LEVELS), self._begin)
        return [self._points(prompt, latents) for prompt, latents in zip(prompts, kept, strict=True)]

    def images(self, prompts: Sequence[str]) -> list[Tensor]:
        """The image of a whole drawing for each prompt: clean latents [C, h, w]."""
        return [latents[0] for latents in self._kept(prompts, (WHOLE, "image"), self._whole)]

    def _kept(self, prompts: Sequence[str], way: Way, draw: Draw) -> list[Tensor]:
        """What is stored of each drawing; what is missing is drawn and stored first."""
        numbers = [list(prompts[:index]).count(prompt) for index, prompt in enumerate(prompts)]
        wanted = list(zip(prompts, numbers, strict=True))
        stored = {pair: self._stored(pair, way) for pair in wanted}
        missing = [pair for pair, latents in stored.items() if latents is None]
        for pair, latents in zip(missing, draw(missing) if missing else [], strict=True):
            stored[pair] = latents
            save_entry(self.folder, self._source(pair, way), {"latents": latents})
        return [held for pair in wanted if (held := stored[pair]) is not None]

    def _source(self, pair: NumberedPrompt, way: Way) -> str:
        parts = (VERSION, self.made_by, self.canvas.shape, self.canvas.side, *way, GUIDANCE, pair[1], pair[0])
        return "\n".join(map(str, parts))

    def _stored(self, pair: NumberedPrompt, way: Way) -> Tensor | None:
        tensors = load_entry(self.folder, self._source(pair, way))
        count = way[1] if isinstance(way[1], int) else 1
        return tensors["latents"] if tensors and tensors["latents"].shape == (count, *self.canvas.shape) else None

    def _points(self, prompt: str, latents: Tensor) -> list[Point]:
        return [
            Point(noisy, t, prompt, self.canvas.geometry)
            for noisy, t in zip(latents, self.canvas.timesteps, strict=True)
        ]

    def _begin(self, pairs: Sequence[NumberedPrompt]) -> list[Tensor]:
        """[LEVELS, C, h, w] for each (prompt, number)."""
        times = self.canvas.timesteps
        noisy = self._start(pairs, times[0])
        kept = [noisy]
        for now, after in itertools.pairwise(times):
            noisy = self._noised(*self._parts([prompt for prompt, _ in pairs], noisy, now), after)
            kept.append(noisy)
        return list(torch.stack(kept, dim=1))

    def _whole(self, pairs: Sequence[NumberedPrompt]) -> list[Tensor]:
        """[1, C, h, w] for each (prompt, number)."""
        times, prompts = self.canvas.times(WHOLE), [prompt for prompt, _ in pairs]
        noisy = self._start(pairs, times[0])
        for now, after in itertools.pairwise(times):
            noisy = self._noised(*self._parts(prompts, noisy, now), after)
        return list(self._parts(prompts, noisy, times[-1])[0][:, None])

    def _start(self, pairs: Sequence[NumberedPrompt], first: Tensor) -> Tensor:
        """[B, C, h, w]: the latents that drawings begin with."""
        noise = torch.stack([_noise(prompt, number, self.canvas.shape) for prompt, number in pairs])
        return self._noised(torch.zeros_like(noise), noise, first)

    def _noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return self.canvas.objective.add_noise(x0, noise, t.expand(len(x0)))

    def _parts(self, prompts: Sequence[str], noisy: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
        """The image and the noise that guided prediction (arXiv:2207.12598 eq. 6) takes the latents for."""
        objective, count, place = self.canvas.objective, len(prompts), self.canvas.geometry
        each = [*prompts, *[""] * count]
        outputs = self.predict([Point(noisy[n % count], now, text, place) for n, text in enumerate(each)])
        with_prompt, without = torch.stack(outputs[:count]), torch.stack(outputs[count:])
        output = without + GUIDANCE * (with_prompt - without)
        t = now.expand(count)
        x0 = objective.clean(noisy, output, t)
        none = torch.zeros_like(x0)
        return x0, (noisy - objective.add_noise(x0, none, t)) / objective.add_noise(none, torch.ones_like(x0), t)


def _noise(prompt: str, number: int, shape: Sequence[int]) -> Tensor:
    return torch.randn(tuple(shape), generator=generator(0, f"verdict drawing {prompt}", number))
