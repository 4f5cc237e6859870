"""Formulas against diffusers' own schedulers and closed forms."""

from __future__ import annotations

import diffusers
import pytest
import torch

from finetune.errors import BadInput
from finetune.objectives import ObjectiveSettings, Schedule, build
from finetune.objectives.diffusion import Diffusion

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def make(prediction: str = "epsilon", **extra: object) -> Diffusion:
    schedule = Schedule.from_config({**SD, "prediction_type": prediction, **extra})
    return Diffusion(schedule)


@pytest.mark.parametrize(
    "config",
    [
        SD,
        {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 500},
        {**SD, "rescale_betas_zero_snr": True},
    ],
)
def test_schedule_equals_diffusers(config: dict) -> None:
    ours = Schedule.from_config(config).alphas_cumprod
    theirs = diffusers.DDIMScheduler(**config).alphas_cumprod
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_snr_at_both_ends_is_the_published_one() -> None:
    snr = make().snr(torch.tensor([0, 146, 147, 999]))
    assert float(snr[0]) == pytest.approx(1175, rel=1e-2)
    assert float(snr[3]) == pytest.approx(0.0047, rel=2e-2)
    assert float(snr[1]) > 5 > float(snr[2])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noise_and_target_equal_diffusers(prediction: str) -> None:
    objective = make(prediction)
    scheduler = diffusers.DDPMScheduler(**SD, prediction_type=prediction)
    x0, noise, t = torch.randn(5, 4, 8, 8), torch.randn(5, 4, 8, 8), torch.tensor([0, 10, 500, 998, 999])
    assert torch.allclose(objective.add_noise(x0, noise, t), scheduler.add_noise(x0, noise, t), atol=1e-6)
    wanted = noise if prediction == "epsilon" else scheduler.get_velocity(x0, noise, t)
    assert torch.allclose(objective.target(x0, noise, t), wanted, atol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_equals_the_papers_formula_and_diffusers(prediction: str) -> None:
    schedule = make(prediction).schedule
    objective = build(ObjectiveSettings(weighting="min_snr", gamma=5), schedule)
    t = torch.tensor([0, 100, 146, 147, 500, 999])
    snr = diffusers.training_utils.compute_snr(diffusers.DDPMScheduler(**SD), t)
    capped = torch.minimum(snr, torch.tensor(5.0))
    wanted = capped / snr if prediction == "epsilon" else capped / (snr + 1)
    assert torch.allclose(objective.weight(t), wanted, rtol=1e-4)


def test_timesteps_cover_the_schedule_uniformly() -> None:
    t = make().timesteps(torch.linspace(0, 1 - 1e-6, 10_000))
    assert torch.equal(t.bincount(minlength=1000), torch.full((1000,), 10))


def test_an_unknown_prediction_and_a_contradiction_are_refused() -> None:
    with pytest.raises(BadInput, match="sample"):
        Schedule.from_config({**SD, "prediction_type": "sample"})
    with pytest.raises(BadInput, match="epsilon"):
        build(ObjectiveSettings(prediction="v_prediction"), make("epsilon").schedule)
