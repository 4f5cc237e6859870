"""Compares ways to hold the weights of full training: fp32, bf16 with stochastic rounding, bf16 with nearest rounding.

    python benchmarks/bf16_weights.py [--steps 150] [--rates 1e-5 1e-4]

The tiny base's denoiser trains on the example photos with the trainer of a run, in bf16 arithmetic each time. Printed
is the loss of the weights, in fp32, over the same noises and timesteps after every fifth of the steps; and how many
of the weights moved, and how far (the root of the mean square).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch

from finetune.core.batch import Batch
from finetune.core.rng import SampleKey
from finetune.data.crops import make_crops
from finetune.data.photos import scan
from finetune.families.base import Family
from finetune.families.source import load_family
from finetune.methods.full import Full
from finetune.objectives.registry import build_objective
from finetune.objectives.settings import ObjectiveSettings
from finetune.optim.adamw import AdamW
from finetune.training import rounding
from finetune.training.accelerate import make_accelerator
from finetune.training.checkpoint import Checkpoints
from finetune.training.settings import Run
from finetune.training.step import Step
from finetune.training.trainer import Trainable, Trainer

PHOTOS = Path(__file__).parents[1] / "examples" / "subject_mug"
PROMPT, LOOKS, SEEN_SEED, BATCH = "a photo of zwx mug", 8, 99, 2
WAYS = ("fp32", "stochastic", "nearest")


@dataclass(frozen=True)
class Photos:
    """Batches of the photos' latents, as a function of the step: `seed` chooses their noises and timesteps."""

    base: Family
    seed: int

    def micro(self, step: int, index: int) -> Batch:
        side = (self.base.resolution, self.base.resolution)
        chosen = sorted(scan(PHOTOS), key=lambda photo: photo.path)
        picked = [chosen[(step * BATCH + slot) % len(chosen)] for slot in range(BATCH)]
        crops = [make_crops(photo, side, "center", 1, False, 0)[0] for photo in picked]
        latents = self.base.codec.encode(torch.stack([crop.pixels() for crop in crops]))
        keys = [SampleKey(self.seed, step, slot) for slot in range(BATCH)]
        names = [photo.path.name for photo in picked]
        return Batch(latents, [PROMPT] * BATCH, torch.ones(BATCH), [crop.geometry for crop in crops], keys, names)


def step_of(family: Family) -> Step:
    return Step(family, ["denoiser"], build_objective(ObjectiveSettings(), family.schedule), family.encode_prompts)


@contextmanager
def rounded_by(way: str) -> Iterator[None]:
    """In the block, weights in bf16 are rounded in this way."""
    if way == "stochastic":
        yield
        return
    with patch.object(rounding, "stochastic_round", lambda value, noise: value.bfloat16()):
        yield


def trained_in(way: str, rate: float, steps: int, base: Family) -> None:
    """Trains, and prints the losses on the way. `base`: the tiny base in fp32; its denoiser is overwritten."""
    held = torch.float32 if way == "fp32" else torch.bfloat16
    family = load_family("tiny", dtype=held)
    family.trained_dtype = held
    trained = Full().attach(family, 0)
    start = {name: value.detach().float().clone() for name, value in trained.items()}
    own, seen, looked = dict(base.parts["denoiser"].named_parameters()), Photos(base, SEEN_SEED), step_of(base)
    losses = []

    def look(done: int) -> None:
        if done % max(1, steps // 5):
            return
        with torch.no_grad():
            for name, value in trained.items():
                own[name.removeprefix("denoiser.")].copy_(value)
            losses.append(sum(float(looked(seen.micro(n, 0))) for n in range(LOOKS)) / LOOKS)

    weights = "fp32" if way == "fp32" else "bf16"
    run = Run(steps=steps, batch_size=BATCH, checkpoint_every=steps, precision="bf16", weights=weights)
    look(0)
    with TemporaryDirectory() as folder, rounded_by(way):
        settings, accelerator = AdamW(lr=rate), make_accelerator(run, False)
        trainer = Trainer(step_of(family), Trainable(trained), settings, run, accelerator, Checkpoints(Path(folder)))
        trainer.fit(Photos(base, 0), look)
    moved = torch.cat([(value.detach().float() - start[name]).flatten() for name, value in trained.items()])
    told = " ".join(f"{loss:.5f}" for loss in losses)
    share, far = float((moved != 0).float().mean()), float(moved.square().mean().sqrt())
    print(f"{rate:g} {way:>10}  loss {told}  moved {share:.1%} of the weights, {far:.2e} on average", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-5, 1e-4])
    options = parser.parse_args()
    for rate in options.rates:
        for way in WAYS:
            base = load_family("tiny")
            trained_in(way, rate, options.steps, base)


if __name__ == "__main__":
    main()
