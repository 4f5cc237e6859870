"""Weights held in bf16: the rounding against closed forms, the step against the fp32 optimiser, exact resume."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import Memory, run_fit
from torch import Tensor, nn

from finetune.config.load import parse_recipe
from finetune.core.errors import BadInput
from finetune.families.source import load_family
from finetune.methods.full import Full
from finetune.optim.adamw import AdamW
from finetune.optim.adamw8bit import AdamW8bit
from finetune.optim.base import Optimiser
from finetune.optim.lion8bit import Lion8bit
from finetune.optim.registry import OPTIMISERS
from finetune.optim.state import load_state_tensors, state_tensors
from finetune.training import rounding
from finetune.training.ema import Ema
from finetune.training.rounding import RoundedOptimizer, build_optimizer, stochastic_round
from finetune.training.settings import Run
from finetune.training.whole import clip_in_fp32

BF16 = torch.bfloat16
HELD = Run(weights="bf16")
ONE_BY_ONE = [AdamW, AdamW8bit, Lion8bit]  # and `paged_adamw8bit`, which needs CUDA


def drawn(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randint(0, 1 << 16, shape, dtype=torch.int32, generator=torch.Generator().manual_seed(seed))


def neighbours(value: Tensor) -> tuple[Tensor, Tensor]:
    """The bf16 numbers (as fp32) next to fp32 numbers, toward zero and away from it, by struct's bits alone."""
    low = (value.view(torch.int32) >> 16) << 16
    high = torch.where(low == value.view(torch.int32), low, low + (1 << 16))
    return low.view(torch.float32), high.view(torch.float32)


# --- the rounding


def test_the_mean_of_many_roundings_is_the_value() -> None:
    """A rounding is one of two neighbours, a step apart: a Bernoulli variable, whose variance is s^2 p (1 - p)."""
    count = 4000
    value = torch.cat(
        [torch.randn(40, generator=torch.Generator().manual_seed(1)), torch.tensor([1e-30, -3e5, 1.9999])]
    )
    rounded = stochastic_round(value.expand(count, -1).contiguous(), drawn((count, len(value)))).double()
    low, high = (side.double() for side in neighbours(value))
    p = (value.double() - low) / (high - low)
    bound = 5 * (high - low).abs() * (p * (1 - p) / count).sqrt()  # five standard deviations
    assert ((rounded.mean(0) - value.double()).abs() <= bound).all()
    nearest = value.to(BF16).double()
    assert ((nearest - value.double()).abs() > bound).float().mean() > 0.8  # which the nearest number is not


def test_each_noise_decides_as_the_formula_says() -> None:
    """All 65536 noises, once each: exactly the fraction of the step rounds away from zero."""
    value = torch.tensor([1.2345678, -0.0321])
    for each in value:
        noise = torch.arange(1 << 16, dtype=torch.int32)
        found = stochastic_round(each.expand(1 << 16).contiguous(), noise)
        low, high = neighbours(each)
        share = float((each.double() - low.double()) / (high.double() - low.double()))
        assert set(found.tolist()) == {float(low), float(high)}
        assert int((found == high).sum()) == round(share * (1 << 16)) > 0


def test_a_rounding_is_within_a_step_and_exact_values_stay() -> None:
    value = torch.randn(5000, generator=torch.Generator().manual_seed(2)) * 10.0 ** torch.arange(-25, 25).repeat(100)
    low, high = neighbours(value)
    found = stochastic_round(value, drawn((5000,))).float()
    assert ((found == low) | (found == high)).all()
    exact = torch.cat([value.to(BF16).float(), torch.tensor([0.0, -0.0, math.inf, -math.inf])])
    kept = stochastic_round(exact, drawn((len(exact),), 3))
    assert torch.equal(kept.view(torch.int16), exact.to(BF16).view(torch.int16))


def test_nan_stays_nan() -> None:
    """CUDA's NaN has all bits set: with a carry it would be -0."""
    nans = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    for noise in (0, 1, 0xFFFF):
        assert stochastic_round(nans, torch.full((4,), noise, dtype=torch.int32)).isnan().all()


# --- the optimiser


def weights(dtype: torch.dtype = BF16) -> dict[str, nn.Parameter]:
    made = torch.Generator().manual_seed(0)
    shapes = {"denoiser.big": (80, 80), "denoiser.small": (5,), "denoiser.one": (), "text_encoder.x": (70, 70)}
    return {
        name: nn.Parameter(torch.randn(shape, generator=made).to(BF16).to(dtype)) for name, shape in shapes.items()
    }


def give_gradients(trained: dict[str, nn.Parameter], step: int) -> None:
    made = torch.Generator().manual_seed(100 + step)
    for parameter in trained.values():
        parameter.grad = torch.randn(parameter.shape, generator=made).to(BF16).to(parameter.dtype)


def step_of(optimizer: RoundedOptimizer, trained: dict[str, nn.Parameter], number: int) -> None:
    optimizer.number = number
    give_gradients(trained, number)
    optimizer.step()


@pytest.mark.parametrize("kind", ONE_BY_ONE)
def test_a_step_is_the_fp32_step_rounded(kind: type[Optimiser]) -> None:
    """Beside the same optimiser on fp32 weights, each step from the same place: the moments are equal bit for bit, and
    each weight is next to the one in fp32. Another learning rate of the text encoders reaches them."""
    settings = kind(lr=3e-3, text_lr=1e-3)
    held, wide = weights(), weights(torch.float32)
    rounded, plain = build_optimizer(settings, held, {}, HELD), settings.build(wide)
    assert isinstance(rounded, RoundedOptimizer)
    for number in range(3):
        give_gradients(wide, number)
        plain.step()
        before = {name: value.detach().clone() for name, value in held.items()}
        step_of(rounded, held, number)
        for name, value in wide.items():
            low, high = neighbours(value.detach())
            assert ((held[name] == low) | (held[name] == high)).all()
            assert value.numel() < 2 or not torch.equal(held[name], before[name])
            value.data.copy_(held[name])
    (ours, said), (theirs, told) = state_tensors(rounded), state_tensors(plain)
    assert said == told
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(stand_in.untyped_storage().nbytes() <= 4 for g in rounded.param_groups for stand_in in g["params"])


@pytest.mark.parametrize("kind", ONE_BY_ONE)
def test_a_saved_state_goes_on_bit_for_bit(kind: type[Optimiser]) -> None:
    held = weights()
    rounded = build_optimizer(kind(lr=3e-3), held, {}, HELD)
    for number in range(4):
        if number == 2:
            tensors, values = copy.deepcopy(state_tensors(rounded))
            kept = {name: nn.Parameter(value.detach().clone()) for name, value in held.items()}
        step_of(rounded, held, number)
    other = build_optimizer(kind(lr=3e-3), kept, {}, HELD)
    load_state_tensors(other, tensors, values)
    generator = torch.get_rng_state()
    for number in (2, 3):
        step_of(other, kept, number)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(held[name], kept[name]) for name in held)


def test_the_noise_is_of_seed_step_and_weight_not_of_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a weight without a gradient, which rests, changes nothing for the others."""

    def after(chunk: int, seed: int = 0, number: int = 0, resting: str = "") -> dict[str, Tensor]:
        monkeypatch.setattr(rounding, "CHUNK", chunk)
        held = weights()
        rounded: Any = build_optimizer(AdamW(lr=3e-3), held, {}, Run(weights="bf16", seed=seed))
        rounded.number = number
        give_gradients(held, 0)
        if resting:
            held[resting].grad = None
        rounded.step()
        return {name: value.detach() for name, value in held.items() if name != resting}

    whole = after(1 << 24)
    for other in (after(1), after(7000), after(1 << 24, resting="denoiser.small")):
        assert all(torch.equal(whole[name], other[name]) for name in other)
    for other in (after(1 << 24, seed=1), after(1 << 24, number=1)):
        assert not torch.equal(whole["denoiser.big"], other["denoiser.big"])


def test_a_bad_step_changes_nothing() -> None:
    """As the loop tells a fused optimiser on a GPU, without a reading; the count of steps stays too."""
    held = weights()
    rounded: Any = build_optimizer(AdamW(lr=3e-3), held, {}, HELD)
    assert rounded._step_supports_amp_scaling
    step_of(rounded, held, 0)
    before = {name: value.detach().clone() for name, value in held.items()}
    moments = {name: value.clone() for name, value in state_tensors(rounded)[0].items()}
    rounded.found_inf = torch.ones(())
    give_gradients(held, 1)
    held["denoiser.big"].grad.fill_(math.nan)
    rounded.number = 1
    rounded.step()
    assert all(torch.equal(before[name], value) for name, value in held.items())
    assert all(torch.equal(moments[name], value) for name, value in state_tensors(rounded)[0].items())
    assert not build_optimizer(AdamW8bit(), held, {}, HELD)._step_supports_amp_scaling  # type: ignore[attr-defined]


def test_small_updates_are_lost_by_the_nearest_number_alone() -> None:
    """400 steps of 1e-4 from 1, where bf16's steps are 0.004 and 0.008: fp32 goes to 0.96."""
    gradient = torch.ones(4096)
    wide, held, nearest = (nn.Parameter(torch.ones(4096, dtype=kind)) for kind in (torch.float32, BF16, BF16))
    settings = AdamW(lr=1e-4, weight_decay=0.0)
    rounded = build_optimizer(settings, {"denoiser.w": held}, {}, HELD)
    pairs = [
        (wide, settings.build({"denoiser.w": wide})),
        (held, rounded),
        (nearest, settings.build({"denoiser.w": nearest})),
    ]
    for number in range(400):
        rounded.number = number  # type: ignore[attr-defined]
        for parameter, optimizer in pairs:
            parameter.grad = gradient.to(parameter.dtype)
            optimizer.step()
    assert float(wide.detach().mean()) == pytest.approx(0.96, abs=1e-4)
    spread = 400**0.5 * 2**-8 / 2 / 4096**0.5  # of the mean: 400 roundings with steps of 2^-8 below 1
    assert float(held.detach().float().mean()) == pytest.approx(0.96, abs=4 * spread)
    assert (nearest == 1).all()


# --- around it


def test_clipping_has_the_norm_of_fp32() -> None:
    held = weights()
    give_gradients(held, 0)
    gradients = torch.cat([value.grad.flatten() for value in held.values()]).double()
    norm = clip_in_fp32(list(held.values()), 1.0)
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(float(gradients.norm()), rel=1e-6)
    clipped = torch.cat([value.grad.flatten() for value in held.values()]).double()
    assert torch.allclose(clipped, gradients / gradients.norm(), rtol=2**-8)


def test_the_average_is_kept_in_fp32() -> None:
    """A constant of 1.5 beside an average that starts at 1: each change is less than bf16 could hold."""
    parameter = nn.Parameter(torch.ones(3, dtype=BF16))
    ema, wanted = Ema({"denoiser.w": parameter}, 0.999), 1.0
    parameter.data.fill_(1.5)
    for step in range(9000, 9100):
        ema.update(step)
        wanted += 0.001 * (1.5 - wanted)
    assert ema.averages["denoiser.w"].dtype == torch.float32
    assert torch.allclose(ema.averages["denoiser.w"], torch.full((3,), wanted), rtol=1e-5)
    with ema.swapped_in():
        assert torch.equal(parameter, torch.full((3,), wanted).to(BF16))
    assert (parameter == 1.5).all()
    assert parameter.dtype == BF16


# --- recipes


def said_of(**sections: dict[str, Any]) -> str:
    plain: dict[str, Any] = {"data": {"photos": "x", "class_noun": "mug"}, "method": {"kind": "full"}}
    with pytest.raises(BadInput) as caught:
        parse_recipe({**plain, "optim": {"kind": "adamw"}, "run": {"weights": "bf16"}, **sections})
    return str(caught.value)


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"method": {"kind": "lora"}}, "method.kind lora trains an adapter"),
        ({"run": {"weights": "bf16", "precision": "fp16"}}, "set run.precision=bf16"),
        ({"run": {"weights": "bf16", "shard": True}}, "run.shard"),
        ({"prior": {"kind": "distance"}}, "prior.kind distance measures"),
    ],
)
def test_what_does_not_train_in_bf16_is_refused(sections: dict[str, Any], told: str) -> None:
    assert told in said_of(**sections)


@pytest.mark.parametrize("kind", list(OPTIMISERS))
def test_every_optimiser_holds_bf16_weights_or_is_refused(kind: str) -> None:
    whole = OPTIMISERS[kind].whole
    assert (whole == "") is (OPTIMISERS[kind] in ONE_BY_ONE or kind == "paged_adamw8bit")
    if whole:
        assert f"optim.kind {kind} {whole}: use adamw" in said_of(optim={"kind": kind})


# --- the loop


def held_fit(base: Path, folder: Path, steps: int, **settings: Any) -> dict[str, Tensor]:
    folder.mkdir(exist_ok=True)
    return run_fit(base, folder, Full(), steps=steps, batches=Memory(4), precision="bf16", **settings)


@pytest.fixture
def in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """`run_fit` loads its base as `finetune.jobs.precision` does for weights in bf16."""

    def load(source: str) -> Any:
        family = load_family(source, dtype=BF16)
        family.trained_dtype = BF16
        return family

    monkeypatch.setattr("test_trainer.load_family", load)


@pytest.mark.slow  # the default tests have a whole run in tests/jobs/test_bf16_weights.py
@pytest.mark.usefixtures("in_bf16")
@pytest.mark.parametrize("kind", ONE_BY_ONE)
def test_a_resumed_run_is_the_same_bit_for_bit(
    kind: type[Optimiser], tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    chosen: dict[str, Any] = {"optim": kind(lr=1e-3, schedule="cosine", schedule_steps=4), "weights": "bf16"}
    chosen |= {"ema": 0.9, "accumulate": 2} if kind is AdamW8bit else {}
    straight = held_fit(tiny_bases["sd1"], tmp_path / "straight", 4, **chosen)
    held_fit(tiny_bases["sd1"], tmp_path / "cut", 2, **chosen)
    resumed = held_fit(tiny_bases["sd1"], tmp_path / "cut", 4, **chosen)
    assert {value.dtype for value in straight.values()} == {BF16}
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
