"""Optimisers: every value that is set is asserted; schedules against closed forms; state comes back bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from finetune.optim.adamw import AdamW
from finetune.optim.adamw8bit import AdamW8bit
from finetune.optim.state import load_state_tensors, state_tensors

KINDS = [AdamW, AdamW8bit]


def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {
        "denoiser.big": nn.Parameter(torch.randn(80, 80)),
        "denoiser.small": nn.Parameter(torch.randn(5)),
        "text_encoder.x": nn.Parameter(torch.randn(70, 70)),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_reaches_the_optimiser(kind: type) -> None:
    settings = kind(lr=3e-3, text_lr=2e-4, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.05)
    optimizer = settings.build(parameters())
    assert [group["lr"] for group in optimizer.param_groups] == [3e-3, 2e-4]
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 1]
    for group in optimizer.param_groups:
        assert tuple(group["betas"]) == (0.8, 0.95)
        assert group["eps"] == 1e-6
        assert group["weight_decay"] == 0.05
    if kind is AdamW:
        assert optimizer.defaults["fused"] is True


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


@pytest.mark.parametrize("kind", KINDS)
def test_state_through_safetensors_continues_bit_for_bit(kind: type) -> None:
    def steps(values: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            for name, value in values.items():
                value.grad = torch.randn(value.shape, generator=torch.Generator().manual_seed(step + len(name)))
            optimizer.step()

    unbroken = parameters()
    steps(unbroken, kind(lr=1e-2).build(unbroken), 0, 6)
    first = parameters()
    optimizer = kind(lr=1e-2).build(first)
    steps(first, optimizer, 0, 3)
    tensors, values = state_tensors(optimizer)
    again = {name: nn.Parameter(value.detach().clone()) for name, value in first.items()}
    resumed = kind(lr=1e-2).build(again)
    load_state_tensors(resumed, load(save({name: value.clone() for name, value in tensors.items()})), values)
    steps(again, resumed, 3, 6)
    assert all(torch.equal(unbroken[name], again[name]) for name in unbroken)
