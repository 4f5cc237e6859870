"""Optimisers: every value that is set is asserted; schedules against closed forms; state comes back bit for bit."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsandbytes import optim as bnb_optim
from bitsandbytes.optim import optimizer as bnb_optimizer
from safetensors.torch import load, save
from torch import nn

from finetune.core.errors import BadInput
from finetune.optim.adamw import AdamW
from finetune.optim.adamw8bit import AdamW8bit
from finetune.optim.lion8bit import Lion8bit
from finetune.optim.paged_adamw8bit import PagedAdamW8bit, paged_class
from finetune.optim.prodigy import Prodigy
from finetune.optim.registry import OPTIMISERS
from finetune.optim.schedule_free import ScheduleFree
from finetune.optim.state import load_state_tensors, state_tensors

KINDS = [kind for kind in OPTIMISERS.values() if kind is not PagedAdamW8bit]  # that one needs CUDA


def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {
        "denoiser.big": nn.Parameter(torch.randn(80, 80)),
        "denoiser.small": nn.Parameter(torch.randn(5)),
        "text_encoder.x": nn.Parameter(torch.randn(70, 70)),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_reaches_the_optimiser(kind: type) -> None:
    own = {} if kind is Prodigy else {"text_lr": 2e-4}
    wanted = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.05}
    if kind is Lion8bit:
        wanted.pop("eps")
    optimizer = kind(lr=3e-3, **own, **wanted).build(parameters())
    assert [group["lr"] for group in optimizer.param_groups] == [3e-3, own.get("text_lr", 3e-3)]
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 1]
    for group in optimizer.param_groups:
        assert {key: group[key] for key in wanted} == wanted
    if kind is AdamW:
        assert optimizer.defaults["fused"] is True


def test_prodigys_own_settings_reach_it() -> None:
    group = Prodigy(d0=1e-5, d_coef=2.0, bias_correction=True, warmup=3).build(parameters()).param_groups[0]
    assert (group["d"], group["d0"], group["d_coef"]) == (1e-5, 1e-5, 2.0)
    assert group["use_bias_correction"] is group["safeguard_warmup"] is True
    group = Prodigy().build(parameters()).param_groups[0]
    assert group["use_bias_correction"] is group["safeguard_warmup"] is False


def test_adamw_is_the_formula() -> None:
    """One step of decoupled weight decay (arXiv:1711.05101): w - lr wd w - lr m^ / (sqrt(v^) + eps)."""
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = AdamW(lr=0.1, weight_decay=0.5).build({"denoiser.w": parameter})
    parameter.grad = torch.tensor([0.3, -0.7])
    optimizer.step()
    wanted = torch.tensor([1.0, -2.0]) * (1 - 0.1 * 0.5) - 0.1 * torch.tensor([1.0, -1.0])
    assert torch.allclose(parameter.data, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ("constant", lambda p: 1.0),
        ("linear", lambda p: 1 - p),
        ("cosine", lambda p: 0.5 * (1 + math.cos(math.pi * p))),
    ],
)
def test_schedules(schedule: str, wanted) -> None:
    settings = AdamW(lr=1.0, schedule=schedule, warmup=10)
    assert [settings.factor(step, 110) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    for step in (10, 35, 60, 109):
        assert settings.factor(step, 110) == pytest.approx(wanted((step - 10) / 100))


def test_set_lr_keeps_the_ratio_of_the_groups() -> None:
    settings = AdamW(lr=1e-3, text_lr=1e-4, schedule="linear")
    optimizer = settings.build(parameters())
    assert settings.set_lr(optimizer, 50, 100) == pytest.approx(5e-4)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([5e-4, 5e-5])


def one_parameter(settings: Any, start: float, gradients: list[float], steps: int = 100) -> list[float]:
    """The weight after each step, all of it ours: the rate is set as the loop sets it."""
    parameter = nn.Parameter(torch.tensor([start], dtype=torch.float64))
    optimizer, seen = settings.build({"denoiser.w": parameter}), []
    for step, gradient in enumerate(gradients):
        settings.set_lr(optimizer, step, steps)
        parameter.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        with settings.result_weights(optimizer):
            seen.append(float(parameter.detach()))
    return seen


def test_lion_is_the_formula() -> None:
    """arXiv:2302.06675, algorithm 2: w - lr (sign(b1 m + (1 - b1) g) + wd w); m = b2 m + (1 - b2) g."""
    weight, momentum, parameter = 2.0, 0.0, nn.Parameter(torch.tensor([2.0]))
    settings = Lion8bit(lr=0.1, weight_decay=0.5, betas=(0.5, 0.8))
    optimizer = settings.build({"denoiser.w": parameter})
    for gradient in (1.0, -0.1, -3.0):
        parameter.grad = torch.tensor([gradient])
        optimizer.step()
        weight -= 0.1 * (math.copysign(1, 0.5 * momentum + 0.5 * gradient) + 0.5 * weight)
        momentum = 0.8 * momentum + 0.2 * gradient
        assert float(parameter.detach()) == pytest.approx(weight, rel=1e-5)


def test_schedule_free_is_the_formula() -> None:
    """arXiv:2405.15682, algorithm 1, with warm-up: what leaves is x, the mean of z weighted by the squared rate."""
    settings = ScheduleFree(lr=0.1, weight_decay=0.5, betas=(0.8, 0.9), warmup=3)
    gradients, (b1, b2) = [0.3, -0.7, 0.2, 1.0, -0.4], (0.8, 0.9)
    x = z = 1.5
    v = total = 0.0
    wanted = []
    for step, gradient in enumerate(gradients):
        y = (1 - b1) * z + b1 * x
        rate = 0.1 * min(1.0, (step + 1) / 3)
        v = b2 * v + (1 - b2) * gradient**2
        z -= rate * (gradient / (math.sqrt(v / (1 - b2 ** (step + 1))) + 1e-8) + 0.5 * y)
        total += rate**2
        x += rate**2 / total * (z - x)
        wanted.append(x)
    assert one_parameter(settings, 1.5, gradients) == pytest.approx(wanted, rel=1e-9)


def test_prodigy_is_the_formula() -> None:
    """arXiv:2306.06101, algorithm 4 (Adam), for one weight; the rate that is logged is its estimate times ours."""
    b1, b2, b3, d0 = 0.9, 0.999, math.sqrt(0.999), 1e-3
    gradients = [0.5, 0.4, 0.6, 0.3, 0.5, 0.7]
    start = w = 1.0
    m = v = r = s = 0.0
    d, wanted = d0, []
    for gradient in gradients:
        m = b1 * m + (1 - b1) * d * gradient
        v = b2 * v + (1 - b2) * d * d * gradient**2
        r = b3 * r + d * d * gradient * (start - w) / d0
        s = b3 * s + d * d * gradient / d0
        estimate = r / abs(s)
        rate, d = d, max(d, estimate)
        w -= rate * m / (math.sqrt(v) + d * 1e-8)
        wanted.append(w)
    settings = Prodigy(d0=d0, weight_decay=0.0)
    assert one_parameter(settings, 1.0, gradients) == pytest.approx(wanted, rel=1e-9)
    assert d > d0


def test_the_logged_rate_of_prodigy_is_the_estimate_times_ours() -> None:
    settings = Prodigy(schedule="linear", d0=1e-3)
    optimizer = settings.build(parameters())
    optimizer.param_groups[0]["d"] = 0.25
    assert settings.set_lr(optimizer, 50, 100) == pytest.approx(0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


def test_looking_at_the_result_changes_no_bit() -> None:
    """schedulefree's own eval() and train() round: a run with previews must be the one without."""
    values = parameters()
    settings = ScheduleFree(lr=1e-2)
    optimizer = settings.build(values)
    steps(values, optimizer, 0, 3)
    before = {name: value.detach().clone() for name, value in values.items()}
    with settings.result_weights(optimizer):
        assert all(not torch.equal(values[name], value) for name, value in before.items())
    assert all(torch.equal(values[name], value) for name, value in before.items())
    assert all(group["train_mode"] for group in optimizer.param_groups)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.windows])
def test_outside_its_window_a_weight_rests(kind: type) -> None:
    values = parameters()
    settings = kind(lr=1e-2)
    optimizer = settings.build(values, {"text_encoder.x": (0.0, 0.5)})
    for step in range(4):
        before = {name: value.detach().clone() for name, value in values.items()}
        settings.set_lr(optimizer, step, 4)
        steps(values, optimizer, step, step + 1)
        moved = {name for name, value in values.items() if not torch.equal(before[name], value)}
        assert moved == (set(values) if step < 2 else {"denoiser.big", "denoiser.small"})


@pytest.mark.parametrize("kind", [Prodigy, ScheduleFree])
def test_windows_are_refused_where_weights_would_not_rest(kind: type) -> None:
    with pytest.raises(BadInput, match="pivotal"):
        kind().build(parameters(), {"text_encoder.x": (0.0, 0.5)})
    kind().build(parameters(), {"text_encoder.x": (0.0, 1.0)})


def test_what_an_optimiser_does_not_have_is_refused() -> None:
    for kind, setting in (
        (Prodigy, {"text_lr": 1e-4}),
        (ScheduleFree, {"schedule": "cosine"}),
        (Lion8bit, {"eps": 1}),
    ):
        with pytest.raises(ValueError, match=next(iter(setting))):
            kind(**setting)
    with pytest.raises(ValueError, match="beta"):
        ScheduleFree(betas=(0.0, 0.9))


def test_paged_moments_are_refused_without_cuda() -> None:
    with pytest.raises(BadInput, match=r"NVIDIA GPU, but this run is on cpu: use optim\.kind=adamw8bit"):
        PagedAdamW8bit().build(parameters())


@pytest.mark.parametrize(("kind", "library"), [(Prodigy, "prodigyopt"), (ScheduleFree, "schedulefree")])
def test_a_library_that_is_missing_is_named(kind: type, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(BadInput, match=f"pip install {library}"):
        kind().build(parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_stated_bytes_of_state_are_those_that_it_holds(kind: type) -> None:
    values = {"denoiser.x": nn.Parameter(torch.randn(2**18))}
    optimizer = kind().build(values)
    steps(values, optimizer, 0, 1)
    shared = {"qmap1", "qmap2"}  # one table for all parameters
    held = sum(
        v.nbytes for k, v in optimizer.state[values["denoiser.x"]].items() if k not in shared and torch.is_tensor(v)
    )
    assert held / 2**18 == pytest.approx(kind.state_bytes, abs=0.01)


def steps(values: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        for name, value in values.items():
            noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(step + len(name)))
            value.grad = noise + 0.5  # a direction, so that Prodigy's estimate grows
        optimizer.step()


def continued(build: Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer]) -> tuple[dict, dict, dict]:
    """Six unbroken steps; three, the state through files, and three more; and the values of the state."""
    unbroken, first = parameters(), parameters()
    steps(unbroken, build(unbroken), 0, 6)
    optimizer = build(first)
    steps(first, optimizer, 0, 3)
    tensors, values = state_tensors(optimizer)
    again = {name: nn.Parameter(value.detach().clone()) for name, value in first.items()}
    resumed = build(again)
    kept = load(save({name: value.clone() for name, value in tensors.items()}))
    load_state_tensors(resumed, kept, json.loads(json.dumps(values)))
    steps(again, resumed, 3, 6)
    return unbroken, again, values


@pytest.mark.parametrize("kind", KINDS)
def test_state_through_safetensors_continues_bit_for_bit(kind: type) -> None:
    unbroken, again, values = continued(kind(lr=1.0 if kind is Prodigy else 1e-2).build)
    assert all(torch.equal(unbroken[name], again[name]) for name in unbroken)
    groups = {name.split("/")[-1] for name in values if name.startswith("groups/")}
    assert {Prodigy: {"d", "k"}, ScheduleFree: {"k", "weight_sum", "lr_max"}}.get(kind, set()) <= groups
    assert bool(groups) == (kind in (Prodigy, ScheduleFree))


@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_the_paged_class_loads_what_it_saved() -> None:
    """Its load makes new buffers; on a CPU they are not paged, and the values are what can be checked."""
    unbroken, again, _ = continued(lambda values: paged_class()(PagedAdamW8bit().groups(values), lr=1e-2))
    assert all(torch.equal(unbroken[name], again[name]) for name in unbroken)


@pytest.mark.parametrize("kind", [AdamW8bit, Lion8bit])
def test_a_step_does_not_wait_after_each_weight(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes' own does, on a GPU; afterwards its module is as before, and the weights are its own's."""
    waited: list[int] = []
    monkeypatch.setattr(bnb_optimizer, "sync_gpu", lambda weight: waited.append(weight.numel()))
    ours, theirs = parameters(), parameters()
    settings = kind(lr=1e-2)
    steps(ours, settings.build(ours), 0, 3)
    assert waited == []
    own = {"adamw8bit": bnb_optim.AdamW8bit, "lion8bit": bnb_optim.Lion8bit}[settings.kind]
    extra = {"eps": settings.eps} if kind is AdamW8bit else {}
    built = own(settings.groups(theirs), lr=1e-2, betas=settings.betas, weight_decay=settings.weight_decay, **extra)
    steps(theirs, built, 0, 3)
    assert len(waited) == 3 * len(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
