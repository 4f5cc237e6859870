"""Every family x method: a run that is killed and started again ends as the unbroken one, bit for bit; and
accumulated micro-batches make the step of the whole batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from finetune.core.batch import Batch, Geometry, Latents
from finetune.core.errors import CheckFailed
from finetune.core.events import sent_to
from finetune.core.rng import SampleKey
from finetune.families.registry import FAMILIES
from finetune.families.source import load_family
from finetune.methods.registry import METHODS
from finetune.objectives.registry import build_objective
from finetune.objectives.settings import ObjectiveSettings
from finetune.optim.adamw import AdamW
from finetune.runs.metrics import MetricsFile
from finetune.training.accelerate import make_accelerator
from finetune.training.checkpoint import Checkpoints
from finetune.training.settings import Run
from finetune.training.step import Step, parts_of
from finetune.training.trainer import Trainable, Trainer

BOTH = ["denoiser", "text_encoders"]
USUAL = ("lora", "full")
CASES = [
    pytest.param(family, kind, marks=() if kind in USUAL else pytest.mark.slow)
    for family in FAMILIES
    for kind in METHODS
]
PROMPTS = ["a photo of a {} mug", "a mug"]


class Fixed:
    """Two samples in `count` micro-batches; the step `bad` is not finite, as a fault in the middle of a run."""

    def __init__(self, channels: int, word: str, bad: int, count: int) -> None:
        made = torch.Generator().manual_seed(0)
        self.mean, self.word = torch.randn(2, channels, 16, 16, generator=made), word
        self.bad, self.size = bad, 2 // count

    def micro(self, step: int, index: int) -> Batch:
        chosen = list(range(index * self.size, (index + 1) * self.size))
        mean = self.mean[chosen] * (float("nan") if step == self.bad else 1)
        geometry = [Geometry((40, 48), (0, 4), (32, 32))] * self.size
        prompts = [PROMPTS[k].format(self.word) for k in chosen]
        latents, draws = Latents(mean, torch.full_like(mean, 0.1)), [SampleKey(0, step, k) for k in chosen]
        return Batch(latents, prompts, torch.ones(self.size), geometry, draws, [f"{k}.png" for k in chosen])


def train(
    base: Path, kind: str, folder: Path, bad: int = -1, count: int = 2, steps: int = 3, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    family = load_family(str(base))
    family.to(device)
    method = METHODS[kind](**({} if kind == "textual_inversion" else {"parts": BOTH}))
    word = method.add_subject_token(family, "zwx", "mug") or "zwx"
    trained = method.attach(family, 0)
    run = Run(steps=steps, batch_size=2, accumulate=count, checkpoint_every=1)
    objective = build_objective(ObjectiveSettings(), family.schedule, family.shift(32))
    trainer = Trainer(
        Step(family, parts_of(trained), objective, family.encode_prompts),
        Trainable(trained, method.windows(trained)),
        AdamW(lr=1e-2),
        run,
        make_accelerator(run, method.is_adapter),
        Checkpoints(folder),
    )
    with sent_to(MetricsFile(folder)):
        trainer.fit(Fixed(family.latent_channels, word, bad, count))
    return {name: value.detach().clone() for name, value in trained.items()}


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_killed_and_resumed_is_the_unbroken_run(
    family: str, kind: str, tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    wanted = train(tiny_bases[family], kind, whole)
    with pytest.raises(CheckFailed):
        train(tiny_bases[family], kind, cut, bad=2)
    resumed = train(tiny_bases[family], kind, cut)
    assert all(torch.equal(value, resumed[name]) for name, value in wanted.items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", USUAL)
def test_micro_batches_have_the_whole_batchs_gradient(
    family: str, kind: str, tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    """By its norm and the mean loss of the first step: Adam's step itself hides the gradient's size."""
    rows = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        train(tiny_bases[family], kind, folder, count=count, steps=1)
        rows.append(json.loads((folder / "metrics.jsonl").read_text()))
    assert rows[1]["loss"] == pytest.approx(rows[0]["loss"], rel=1e-5)
    assert rows[1]["grad_norm"] == pytest.approx(rows[0]["grad_norm"], rel=1e-4) != 0
