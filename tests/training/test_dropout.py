"""Dropout per sample: its rate and mean, and that neither the batch's split nor the order of calls changes it."""

from __future__ import annotations

import torch
from torch import nn

from finetune.core.rng import SampleKey
from finetune.training.dropout import CurrentSamples, SampleDropout, replace_dropout


def dropped(p: float, draws: list[SampleKey], x: torch.Tensor, name: str = "a") -> torch.Tensor:
    return SampleDropout(p, name, CurrentSamples(draws)).train()(x)


def test_the_rate_and_the_mean_are_those_of_dropout() -> None:
    out = dropped(0.3, [SampleKey(0, step, 0) for step in range(8)], torch.ones(8, 50_000))
    assert abs(float((out == 0).float().mean()) - 0.3) < 0.005
    assert abs(float(out.mean()) - 1) < 0.005
    assert torch.allclose(out[out != 0], torch.tensor(1 / 0.7))


def test_a_mask_is_the_samples_own() -> None:
    draws = [SampleKey(0, 3, slot) for slot in range(4)]
    x = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
    whole = dropped(0.5, draws, x)
    halves = torch.cat([dropped(0.5, draws[:2], x[:2]), dropped(0.5, draws[2:], x[2:])])
    assert torch.equal(whole, halves)
    assert torch.equal(whole, dropped(0.5, draws, x))
    assert not torch.equal(whole, dropped(0.5, draws, x, name="b"))
    assert not torch.equal(whole, dropped(0.5, [SampleKey(0, 4, slot) for slot in range(4)], x))


def test_in_eval_nothing_is_dropped() -> None:
    current, ones = CurrentSamples([SampleKey(0, 0, 0)]), torch.ones(1, 9)
    assert torch.equal(SampleDropout(0.5, "a", current).eval()(ones), ones)
    layer = SampleDropout(0.5, "a", current).train()
    with current.without_dropout():
        assert torch.equal(layer(ones), ones)
    assert not torch.equal(layer(ones), ones)


def test_two_models_do_not_share_their_samples() -> None:
    first, second = nn.Sequential(nn.Dropout(0.5)), nn.Sequential(nn.Dropout(0.5))
    samples = CurrentSamples([SampleKey(0, 0, 0)])
    replace_dropout(first.train(), "denoiser", samples)
    replace_dropout(second.train(), "denoiser", CurrentSamples())
    ones = torch.ones(1, 50)
    assert not torch.equal(first(ones), ones)
    assert torch.equal(second(ones), ones)


def test_only_active_dropouts_are_replaced() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.Sequential(nn.Dropout(0.0), nn.Dropout(0.2)))
    replace_dropout(model, "denoiser", CurrentSamples())
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert kinds["1"] is kinds["2.1"] is SampleDropout
    assert kinds["2.0"] is nn.Dropout
    assert model[2][1].name == "denoiser.2.1"
