"""Predictions leave no trace in a run; the bank's drawings are DDIM, and stored drawings are checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from finetune.core.batch import Geometry
from finetune.families.source import load_family
from finetune.methods.lora import LoRA
from finetune.objectives.base import Objective
from finetune.objectives.densities import Uniform
from finetune.objectives.registry import build_objective
from finetune.objectives.schedule import FlowSchedule, Schedule
from finetune.objectives.settings import ObjectiveSettings
from finetune.verdicts.bank import LEVELS, WHOLE, Bank, Canvas
from finetune.verdicts.points import Point, Predictor, asked, loss, squared_distance

PLACE = Geometry((16, 16), (0, 0), (16, 16))
UNIFORM = ObjectiveSettings(density=Uniform())
SCHEDULES = {
    "epsilon": Schedule.from_config({"num_train_timesteps": 1000}),
    "v_prediction": Schedule.from_config({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    "flow_prediction": FlowSchedule(shift=3.0),
}


def some_points(count: int, channels: int = 4) -> list[Point]:
    made = torch.Generator().manual_seed(0)
    prompts = ["a mug", "", "a photo of a mug", "a red car"]
    return [
        Point(torch.randn(channels, 16, 16, generator=made), torch.tensor(100 + 200 * n), prompts[n % 4], PLACE)
        for n in range(count)
    ]


def test_a_prediction_leaves_no_trace(tiny_bases: dict[str, Path]) -> None:
    """Modes, gradients and the state of every random generator are as before; batches do not matter."""
    family = load_family(str(tiny_bases["sd1"]))
    LoRA(rank=2, dropout=0.5).attach(family, 0)
    family.parts["denoiser"].train()
    modes = [module.training for module in family.parts["denoiser"].modules()]
    state, points = torch.get_rng_state(), some_points(5, family.codec.channels)
    one, together = (Predictor(family, family.encode_prompts, size)(points) for size in (1, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in family.parts["denoiser"].modules()] == modes
    assert not any(output.requires_grad for output in one)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, together, strict=True))
    family.parts["denoiser"].eval()
    cond = family.encode_prompts([points[3].prompt])
    direct = family.predict(points[3].noisy[None], points[3].t[None], cond, [PLACE])
    assert torch.allclose(direct[0], one[3], atol=1e-6)


def test_loss_and_distance_are_means_over_points() -> None:
    made = torch.Generator().manual_seed(1)
    outputs, others = (list(torch.randn(3, 4, 8, 8, generator=made)) for _ in range(2))
    mask = torch.zeros(1, 8, 8)
    mask[:, :4] = 1
    pairs = list(zip(outputs, others, strict=True))
    plain = [Point(output, torch.tensor(0), "", PLACE, target=other) for output, other in pairs]
    wanted = float(mse_loss(torch.stack(outputs), torch.stack(others)))
    assert loss(plain, outputs) == pytest.approx(wanted) == squared_distance(outputs, others)
    masked = [Point(p.noisy, p.t, "", PLACE, target=p.target, mask=mask) for p in plain]
    half = float(mse_loss(torch.stack(outputs)[:, :, :4], torch.stack(others)[:, :, :4]))
    assert loss(masked, outputs) == pytest.approx(half)
    assert [point.prompt for point in asked(plain, ["a", "b"])] == ["a", "b", "a"]


class Exact:
    """The ideal model of a world with one image: it predicts what training would have as its target there."""

    def __init__(self, objective: Objective, image: Tensor) -> None:
        self.objective, self.image, self.calls = objective, image, 0

    def __call__(self, points: Sequence[Point]) -> list[Tensor]:
        self.calls += 1
        found = []
        for point in points:
            t, x0 = point.t[None], self.image[None]
            none = torch.zeros_like(x0)
            noise = (point.noisy[None] - self.objective.add_noise(x0, none, t)) / self.objective.add_noise(
                none, torch.ones_like(x0), t
            )
            found.append(self.objective.target(x0, noise, t)[0])
        return found


@pytest.mark.parametrize("prediction", SCHEDULES)
def test_a_drawing_is_the_way_to_the_image(prediction: str, tmp_path: Path) -> None:
    """With the ideal model DDIM keeps to the straight way: each latent is the image with the first one's noise."""
    objective = build_objective(UNIFORM, SCHEDULES[prediction])
    image = torch.rand(4, 4, 4, generator=torch.Generator().manual_seed(2))
    model = Exact(objective, image)
    bank = Bank(model, canvas := Canvas((4, 4, 4), 32, objective), "base", tmp_path)
    points = bank.drawings(["a cat", "", "a cat"])
    assert [len(way) for way in points] == [LEVELS] * 3
    assert float(canvas.timesteps[0]) >= 999
    for way in points:
        first, second = way[0], way[1]
        none = torch.zeros_like(image)[None]
        noise = (second.noisy - objective.add_noise(image[None], none, second.t[None])[0]) / objective.add_noise(
            none, torch.ones_like(none), second.t[None]
        )[0]
        assert torch.allclose(
            second.noisy, objective.add_noise(image[None], noise[None], second.t[None])[0], atol=1e-5
        )
        # of the first latents, which are pure noise, the second ones keep it: scaled where some signal is left there
        start = first.noisy / objective.add_noise(none, torch.ones_like(none), first.t[None])[0]
        assert torch.nn.functional.cosine_similarity(start.flatten(), noise.flatten(), dim=0) > 0.99
    assert not torch.equal(points[0][0].noisy, points[2][0].noisy)  # the same prompt again has other noise


@pytest.mark.parametrize("prediction", SCHEDULES)
def test_a_whole_drawing_is_the_image(prediction: str, tmp_path: Path) -> None:
    objective = build_objective(UNIFORM, SCHEDULES[prediction])
    image = torch.rand(4, 4, 4, generator=torch.Generator().manual_seed(2))
    model = Exact(objective, image)
    bank = Bank(model, Canvas((4, 4, 4), 32, objective), "base", tmp_path)
    (found,) = bank.images(["a cat"])
    assert torch.allclose(found, image, atol=1e-4)
    assert model.calls == WHOLE
    assert torch.equal(bank.images(["a cat"])[0], found)
    assert model.calls == WHOLE  # the stored one
    bank.drawings(["a cat"])
    assert model.calls == WHOLE + LEVELS - 1  # another entry than the beginning of a drawing


def test_drawings_are_stored_and_made_again_when_damaged(tmp_path: Path) -> None:
    objective = build_objective(UNIFORM, SCHEDULES["epsilon"])
    model = Exact(objective, torch.rand(4, 4, 4))
    bank = Bank(model, Canvas((4, 4, 4), 32, objective), "base", tmp_path)
    first = bank.drawings(["a cat"])
    calls = model.calls
    again = bank.drawings(["a cat"])
    assert model.calls == calls
    file = next(tmp_path.rglob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(bytes(content))
    after = bank.drawings(["a cat"])
    assert model.calls > calls
    for one, two, three in zip(first[0], again[0], after[0], strict=True):
        assert torch.equal(one.noisy, two.noisy)
        assert torch.equal(one.noisy, three.noisy)
    Bank(model, bank.canvas, "another base", tmp_path).drawings(["a cat"])
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
