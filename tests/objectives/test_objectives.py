"""Formulas against diffusers' own schedulers and closed forms."""

from __future__ import annotations

import math

import diffusers
import pytest
import torch

from finetune.core.errors import BadInput
from finetune.core.rng import SampleKey
from finetune.objectives.base import Objective
from finetune.objectives.diffusion import Diffusion
from finetune.objectives.flow import RectifiedFlow
from finetune.objectives.registry import build_objective
from finetune.objectives.schedule import FlowSchedule, Schedule, read_schedule
from finetune.objectives.settings import ObjectiveSettings
from finetune.objectives.weightings.registry import WEIGHTINGS
from finetune.testing import contract

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
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000},
        {"trained_betas": [0.01, 0.02, 0.05], "num_train_timesteps": 3},
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
    objective = build_objective(ObjectiveSettings(weighting={"kind": "min_snr", "gamma": 5}), schedule)
    t = torch.tensor([0, 100, 146, 147, 500, 999])
    snr = diffusers.training_utils.compute_snr(diffusers.DDPMScheduler(**SD), t)
    capped = torch.minimum(snr, torch.tensor(5.0))
    wanted = capped / snr if prediction == "epsilon" else capped / (snr + 1)
    assert torch.allclose(objective.weight(t), wanted, rtol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_clean_is_the_inverse_of_target(prediction: str) -> None:
    objective = any_objective(prediction)
    x0, noise = torch.randn(5, 4, 8, 8), torch.randn(5, 4, 8, 8)
    t = objective.timesteps(torch.tensor([0.01, 0.2, 0.5, 0.7, 0.9]))
    again = objective.clean(objective.add_noise(x0, noise, t), objective.target(x0, noise, t), t)
    assert torch.allclose(again, x0, atol=1e-4)


def any_objective(prediction: str, **settings: object) -> Objective:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler"} if prediction == "flow_prediction" else SD
    schedule = read_schedule({**config, "prediction_type": prediction})
    return build_objective(ObjectiveSettings(**settings), schedule)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_every_weight_keeps_the_contract(weighting: str) -> None:
    contract.a_weight_is_finite_and_above_0(WEIGHTINGS[weighting]())
    contract.a_weight_is_the_same_for_every_prediction(WEIGHTINGS[weighting]())


def test_without_a_weight_every_timestep_counts_the_same() -> None:
    for prediction in ("epsilon", "v_prediction", "sample"):
        weight = any_objective(prediction).weight(torch.tensor([0, 500, 999]))
        assert torch.equal(weight, torch.ones(3))
        assert weight.dtype == torch.float32


@pytest.mark.parametrize("weighting", ["min_snr", "debiased", "p2"])
def test_a_weight_is_the_same_for_every_prediction(weighting: str) -> None:
    """The same x0^ gives the same weighted loss, whatever the model predicts: checked through `clean`, on tensors."""
    x0, noise, wrong = torch.randn(4, 8), torch.randn(4, 8), torch.randn(4, 8)
    t = torch.tensor([30, 200, 500, 900])
    losses = []
    for prediction in ("epsilon", "v_prediction", "sample"):
        objective = any_objective(prediction, weighting=weighting)
        noisy, target = objective.add_noise(x0, noise, t), objective.target(x0, noise, t)
        slope = (objective.clean(noisy, target + 1, t) - objective.clean(noisy, target, t))[:, :1]
        output = target + wrong / slope  # the output whose x0 is off by `wrong`
        assert torch.allclose(objective.clean(noisy, output, t), x0 + wrong, atol=1e-3)
        losses.append((output - target).square().mean(1) * objective.weight(t))
    assert torch.allclose(losses[0], losses[1], rtol=1e-3)
    assert torch.allclose(losses[0], losses[2], rtol=1e-3)


def test_debiased_and_p2_are_the_papers_for_epsilon() -> None:
    t = torch.tensor([0, 100, 500, 999])
    snr = diffusers.training_utils.compute_snr(diffusers.DDPMScheduler(**SD), t)
    debiased = any_objective("epsilon", weighting="debiased").weight(t)
    assert torch.allclose(debiased, 1 / snr.clamp(max=1000).sqrt(), rtol=1e-3)
    assert torch.allclose(any_objective("epsilon", weighting="p2").weight(t), 1 / (1 + snr), rtol=1e-3)
    rooted = any_objective("epsilon", weighting={"kind": "p2", "gamma": 0.5}).weight(t)
    assert torch.allclose(rooted, (1 + snr).rsqrt(), rtol=1e-3)


@pytest.mark.parametrize("weighting", ["min_snr", "debiased", "p2"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_weights_are_finite_at_zero_terminal_snr(weighting: str, prediction: str) -> None:
    schedule = Schedule.from_config({**SD, "prediction_type": prediction, "rescale_betas_zero_snr": True})
    weight = build_objective(ObjectiveSettings(weighting=weighting), schedule).weight(torch.tensor([999]))
    assert bool(weight.isfinite())


def cdf(density: str, t: float) -> float:
    """P(T <= t): closed forms, and for `mode` the root of its monotonic map found by bisection."""
    if density == "uniform":
        return t
    if density == "logit_normal":  # m = 0.5, s = 1.5
        return 0.5 * (1 + math.erf((math.log(t / (1 - t)) - 0.5) / 1.5 / math.sqrt(2)))
    if density == "cosmap":  # the integral of 2 / (pi - 2 pi t + 2 pi t^2)
        return (math.atan(2 * t - 1) + math.pi / 4) / (math.pi / 2)
    low, high = 0.0, 1.0
    for _ in range(60):
        u = (low + high) / 2
        value = 1 - u - 1.29 * (math.cos(math.pi * u / 2) ** 2 - 1 + u)
        low, high = (low, u) if value < t else (u, high)
    return 1 - low


@pytest.mark.parametrize("density", ["uniform", "logit_normal", "mode", "cosmap"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_densities_have_the_closed_form_distribution(density: str, shift: float) -> None:
    """Kolmogorov-Smirnov: sup |F_n - F| < 1.63 / sqrt(n) at the 1 % level, on 20,000 draws."""
    own = {"mean": 0.5, "std": 1.5} if density == "logit_normal" else {}
    settings = ObjectiveSettings(density={"kind": density, **own})
    objective = RectifiedFlow(FlowSchedule(), settings, shift)
    n = 20_000
    drawn = objective.timesteps(torch.rand(n, generator=torch.Generator().manual_seed(0))) / 1000
    unshifted = (drawn / (shift - (shift - 1) * drawn)).double().clamp(1e-9, 1 - 1e-9).sort().values
    wanted = torch.tensor([cdf(density, float(t)) for t in unshifted])
    distance = (torch.arange(1, n + 1) / n - wanted).abs().max()
    assert float(distance) < 1.63 / n**0.5
    if density != "uniform":
        plain = torch.tensor([float(t) for t in unshifted])
        assert float((torch.arange(1, n + 1) / n - plain).abs().max()) > 3 / n**0.5, "the test could not fail"


def test_what_is_drawn_is_told() -> None:
    assert RectifiedFlow(FlowSchedule(), shift=1.5).describe() == (
        "logit_normal over the noise levels, shift 1.5 (above 1: more noise)"
    )
    assert any_objective("epsilon", timesteps="stratified").describe() == (
        "uniform over the noise levels, spread evenly in each step"
    )


def test_a_positive_logit_mean_is_towards_noise() -> None:
    """The paper's sign; diffusers' SD3 recipe has it reversed."""
    u = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    low, high = (
        RectifiedFlow(FlowSchedule(), ObjectiveSettings(logit_mean=m)).timesteps(u).mean() for m in (-1.0, 1.0)
    )
    assert low < 400 < 600 < high


def test_the_flow_equals_diffusers() -> None:
    objective, scheduler = any_objective("flow_prediction"), diffusers.FlowMatchEulerDiscreteScheduler()
    x0, noise = torch.randn(3, 16, 4, 4), torch.randn(3, 16, 4, 4)
    t = scheduler.timesteps[[100, 500, 999]]
    assert torch.allclose(objective.add_noise(x0, noise, t), scheduler.scale_noise(x0, t, noise), atol=1e-6)
    stepped = objective.add_noise(x0, noise, t) - (t / 1000).view(-1, 1, 1, 1) * objective.target(x0, noise, t)
    assert torch.allclose(stepped, x0, atol=1e-5)


def test_shifts_are_sd3s_and_diffusers_for_flux() -> None:
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    sd3 = FlowSchedule.from_config({"shift": 3.0})
    assert sd3.shift_for(1024, 1024, 4096) == 3.0
    assert sd3.shift_for(512, 1024, 1024) == pytest.approx(3.0 * math.sqrt(512**2 / 1024**2))
    assert sd3.shift_for(128, 1024, 64) == 1.0
    flux = FlowSchedule.from_config({"shift": 3.0, "use_dynamic_shifting": True})
    for side in (256, 512, 1024):
        tokens = (side // 16) ** 2
        assert flux.shift_for(side, 1024, tokens) == pytest.approx(math.exp(calculate_shift(tokens)))


def test_huber_is_quadratic_near_and_linear_far() -> None:
    objective = any_objective("epsilon", loss={"kind": "huber", "c": 0.1})
    zero = torch.zeros(1)
    near, far, further = (float(objective.error(torch.tensor([x]), zero)) for x in (1e-3, 10.0, 11.0))
    assert near == pytest.approx(1e-6, rel=1e-2)
    assert further - far == pytest.approx(2 * 0.1, rel=1e-3)
    assert float(any_objective("epsilon").error(torch.tensor([3.0]), zero)) == 9.0


def test_noise_offset_is_a_constant_per_channel_and_perturbation_is_not_in_the_target() -> None:
    draws = [SampleKey(0, 1, k) for k in range(3)]
    plain, added = any_objective("epsilon").noises(draws, (4, 8, 8))
    assert torch.equal(plain, added)
    offset, _ = any_objective("epsilon", noise_offset=0.1).noises(draws, (4, 8, 8))
    difference = offset - plain
    assert torch.allclose(difference, difference[:, :, :1, :1].expand_as(difference), atol=1e-6)
    assert 0.02 < float(difference.std()) < 0.3
    known, added = any_objective("epsilon", input_perturbation=0.1).noises(draws, (4, 8, 8))
    assert torch.equal(known, plain)
    assert float((added - plain).std()) == pytest.approx(0.1, rel=0.15)


def test_a_weighting_on_a_flow_and_a_bad_shift_are_refused() -> None:
    with pytest.raises(BadInput, match="density"):
        any_objective("flow_prediction", weighting="min_snr")
    with pytest.raises(BadInput, match="shift"):
        any_objective("flow_prediction", shift=0)


def test_timesteps_cover_the_schedule_uniformly() -> None:
    t = make().timesteps(torch.linspace(0, 1 - 1e-6, 10_000))
    assert torch.equal(t.bincount(minlength=1000), torch.full((1000,), 10))


def test_an_unknown_prediction_and_a_contradiction_are_refused() -> None:
    with pytest.raises(BadInput, match="noise_and_x0"):
        read_schedule({**SD, "prediction_type": "noise_and_x0"})
    with pytest.raises(BadInput, match="epsilon"):
        build_objective(ObjectiveSettings(prediction="v_prediction"), make("epsilon").schedule)
