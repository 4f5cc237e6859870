"""Contract tests for methods, optimisers and loss weights, as plain functions of a base folder and settings.

tests/contract runs them for everything in the registries. A package that adds a method, an optimiser or a loss weight
can run them for its own. Each raises AssertionError if the contract is broken. `finetune.testing.tiny` writes small
bases for them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.core.batch import Batch, Geometry, Latents
from finetune.core.errors import BadInput, CheckFailed
from finetune.core.events import sent_to
from finetune.core.rng import SampleKey
from finetune.families.base import Family
from finetune.families.source import load_family
from finetune.methods.base import Method
from finetune.methods.registry import METHODS
from finetune.objectives.registry import build_objective
from finetune.objectives.schedule import DIFFUSION, Schedule
from finetune.objectives.settings import ObjectiveSettings
from finetune.objectives.weightings.base import Weighting
from finetune.optim.adamw import AdamW
from finetune.optim.base import Optimiser
from finetune.runs.metrics import MetricsFile
from finetune.training.accelerate import make_accelerator
from finetune.training.checkpoint import Checkpoints
from finetune.training.fast import quickened
from finetune.training.settings import Run
from finetune.training.step import Step, parts_of
from finetune.training.trainer import Trainable, Trainer

Parameters = dict[str, nn.Parameter]
PROMPTS = ["a photo of a {} mug", "a mug"]


@dataclass(frozen=True)
class ShortRun:
    """A run of a few steps on two samples.

    `count`: micro-batches in each step. `bad`: the step whose data contain NaN (-1: no step). `optim`: the optimiser;
    None for AdamW.
    """

    steps: int = 3
    count: int = 2
    bad: int = -1
    device: str = "cpu"
    optim: Optimiser | None = None
    fast: bool = False


WHOLE = ShortRun()


def killed_and_resumed_is_the_unbroken_run(
    base: Path, kind: str, folder: Path, optim: Optimiser | None = None, fast: bool = False, **settings: Any
) -> None:
    """A run that fails in its last step and is resumed ends bit-identical to an uninterrupted run."""
    whole, cut = folder / "whole", folder / "cut"
    whole.mkdir()
    cut.mkdir()
    unbroken = ShortRun(optim=optim, fast=fast)
    wanted = train(base, kind, whole, unbroken, **settings)
    try:
        train(base, kind, cut, replace(unbroken, bad=2), **settings)
    except CheckFailed:
        resumed = train(base, kind, cut, unbroken, **settings)
    else:
        raise AssertionError("a step with NaN in its data did not end the run")
    changed = [name for name, value in wanted.items() if not torch.equal(value, resumed[name])]
    assert not changed, f"{len(changed)} of {len(wanted)} weights differ after a resume, such as {changed[0]}"


def only_what_should_move_moves(base: Path, kind: str, parts: list[str]) -> None:
    """Training changes every trained weight and no other, and trained weights are fp32."""
    family = load_family(str(base))
    before = weights(family)
    _, trained, word = attached(kind, parts, family)
    start = {n: p.detach().clone() for n, p in trained.items()}
    train_a_little(family, trained, word)
    after = weights(family)
    for n, value in before.items():
        held = after.get(n, after.get(n.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")))
        assert n in trained or (held is not None and torch.equal(held, value)), f"{n} is not trained, but it changed"
    still = [n for n, value in start.items() if torch.equal(trained[n], value)]
    assert not still, f"trained but unchanged: {still[:3]}"
    assert all(p.dtype == torch.float32 for p in trained.values()), "trained weights must be fp32"
    assert {n for part, m in family.parts.items() for n in _wanting(part, m)} == set(trained)


def every_trained_weight_gets_a_gradient(base: Path, kind: str, parts: list[str]) -> None:
    family = load_family(str(base))
    _, trained, word = attached(kind, parts, family)
    predict(family, 0, word).square().mean().backward()
    missing = [n for n, p in trained.items() if p.grad is None]
    assert not missing, f"no gradient: {missing[:3]}"


def step_0_is_the_base_and_the_seed_decides(base: Path, kind: str, parts: list[str]) -> None:
    family, again = (load_family(str(base)) for _ in range(2))
    before = predict(family)
    _, first, word = attached(kind, parts, family)
    assert torch.equal(predict(family, 0, word), before), "before training the prediction differs from the base's"
    _, second, _ = attached(kind, parts, again)
    assert all(torch.equal(first[n], second[n]) for n in first), "the same seed created different initial weights"


def saved_and_loaded_is_the_same(base: Path, kind: str, parts: list[str]) -> None:
    """A saved and loaded state is bit-identical, and a state with a missing tensor is refused."""
    family, again = (load_family(str(base)) for _ in range(2))
    method, trained, word = attached(kind, parts, family)
    train_a_little(family, trained, word)
    attached(kind, parts, again, 5)
    assert not torch.equal(predict(family, 0, word), predict(again, 0, word)), "training changed nothing"
    state = method.state_dict(family)
    method.load_state_dict(again, state)
    assert torch.equal(predict(family, 0, word), predict(again, 0, word)), (
        "the loaded state differs from the saved one"
    )
    state.pop(next(iter(state)))
    try:
        method.load_state_dict(again, state)
    except BadInput:
        return
    raise AssertionError("a state with a missing tensor was loaded without an error")


def checkpointing_gives_the_same_gradients(base: Path, kind: str, parts: list[str]) -> None:
    gradients: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        family = load_family(str(base))
        method, trained, word = attached(kind, parts, family)
        for part in method.part_names(family):
            family.parts[part].train()
        if checkpointing:
            family.enable_gradient_checkpointing(method.part_names(family))
        predict(family, 0, word).square().mean().backward()
        gradients.append({n: p.grad for n, p in trained.items() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for n, value in gradients[0].items():
        assert torch.allclose(value, gradients[1][n], rtol=1e-4, atol=1e-7), n


def switched_off_is_the_base(base: Path, kind: str) -> None:
    """An adapter can be switched off and on again."""
    family = load_family(str(base))
    before = predict(family)
    method = method_of(kind, parts=["denoiser", "text_encoders"])
    train_a_little(family, method.attach(family, 0))
    assert not torch.equal(predict(family), before), "training changed nothing"
    with method.disabled(family):
        assert torch.equal(predict(family), before), "the prediction without the adapter differs from the base's"
    assert not torch.equal(predict(family), before), "it was not switched on again"


def a_weight_is_finite_and_above_0(weighting: Weighting) -> None:
    """A loss weight returns one float32 number above 0 for each sample, for any SNR from 0 to infinity and for each
    kind of prediction."""
    snr = torch.tensor([0.0, 1e-8, 1e-3, 1.0, 5.0, 1e3, 1e7, float("inf")])
    for prediction in DIFFUSION:
        weight = weighting.weight(snr, prediction)
        assert weight.shape == snr.shape, f"{tuple(weight.shape)} for {tuple(snr.shape)} SNRs ({prediction})"
        assert weight.dtype == torch.float32, f"{weight.dtype}, not float32 ({prediction})"
        odd = [f"{float(w)} at SNR {float(s):g}" for s, w in zip(snr, weight, strict=True) if not 0 < w < float("inf")]
        assert not odd, f"not finite and above 0: {odd[0]} ({prediction})"
        alone = torch.cat([weighting.weight(each[None], prediction) for each in snr])
        assert torch.equal(alone, weight), (
            f"a sample's weight depends on the other samples of its batch ({prediction})"
        )


def a_weight_is_the_same_for_every_prediction(weighting: Weighting) -> None:
    """The same error of x0 has the same loss for each kind of prediction (x0 comes from `Objective.clean`)."""
    made = torch.Generator().manual_seed(0)
    x0, noise, wrong = (torch.randn(4, 8, generator=made) for _ in range(3))
    t, settings = torch.tensor([30, 200, 500, 900]), ObjectiveSettings().model_copy(update={"weighting": weighting})
    losses = []
    for prediction in DIFFUSION:
        schedule = Schedule.from_config({"num_train_timesteps": 1000, "prediction_type": prediction})
        objective = build_objective(settings, schedule)
        noisy, target = objective.add_noise(x0, noise, t), objective.target(x0, noise, t)
        slope = (objective.clean(noisy, target + 1, t) - objective.clean(noisy, target, t))[:, :1]
        output = target + wrong / slope  # the output whose x0 is off by `wrong`
        losses.append((output - target).square().mean(1) * objective.weight(t))
    for prediction, loss in zip(DIFFUSION, losses, strict=True):
        assert torch.allclose(loss, losses[0], rtol=1e-3), (
            f"the loss for {prediction} differs from that for {DIFFUSION[0]}"
        )


class Fixed:
    """Batches of two samples in `count` micro-batches. The data of step `bad` contain NaN."""

    def __init__(self, channels: int, word: str, bad: int, count: int) -> None:
        made = torch.Generator().manual_seed(0)
        self.mean, self.word = torch.randn(2, channels, 16, 16, generator=made), word
        self.bad, self.size = bad, 2 // count

    def micro(self, step: int, index: int) -> Batch:
        chosen = list(range(index * self.size, (index + 1) * self.size))
        mean = self.mean[chosen] * (float("nan") if step == self.bad else 1)
        geometry = [Geometry((40, 48), (0, 4), (32, 32))] * self.size
        prompts = [PROMPTS[k].format(self.word) for k in chosen]
        latents, keys = Latents(mean, torch.full_like(mean, 0.1)), [SampleKey(0, step, k) for k in chosen]
        names = [f"{k}.png" for k in chosen]
        weight = torch.ones(self.size)
        return Batch(latents=latents, prompts=prompts, weight=weight, geometry=geometry, keys=keys, names=names)


def train(base: Path, kind: str, folder: Path, short: ShortRun = WHOLE, **settings: Any) -> dict[str, Tensor]:
    """Runs `Trainer` in `folder` with a checkpoint after each step. Returns the trained tensors by name.

    `settings`: the method's settings. Without any, all parts are trained if the method has that setting.
    """
    family = load_family(str(base))
    family.parts.to(short.device)
    own = {} if kind == "textual_inversion" else {"parts": ["denoiser", "text_encoders"]}
    method = method_of(kind, **own | settings)
    word = method.add_subject_token(family, "zwx", "mug") or "zwx"
    trained = method.attach(family, 0)
    run = Run(steps=short.steps, batch_size=2, accumulate=short.count, checkpoint_every=1)
    objective = build_objective(ObjectiveSettings(), family.schedule, family.shift(32))
    trainer = Trainer(
        Step(family, parts_of(trained), objective, family.encode_prompts),
        Trainable(trained, method.windows(trained)),
        short.optim or AdamW(lr=1e-2),
        run,
        make_accelerator(run, method.is_adapter),
        Checkpoints(folder),
    )
    with sent_to(MetricsFile(folder)), quickened(family.parts.values(), short.fast):
        trainer.fit(Fixed(family.codec.channels, word, short.bad, short.count))
    return {name: value.detach().clone() for name, value in trained.items()}


def method_of(kind: str, **settings: Any) -> Any:
    return METHODS[kind](**settings)


def attached(kind: str, parts: list[str], family: Family, seed: int = 0) -> tuple[Method, Parameters, str]:
    """Attaches a method to a family. Returns the method, its trained parameters, and the word for the subject: `zwx`,
    or a new word that starts as a copy of it."""
    method = method_of(kind, parts=parts)
    word = method.add_subject_token(family, "zwx", "zwx") or "zwx"
    return method, method.attach(family, seed), word


def predict(family: Family, seed: int = 0, word: str = "zwx") -> Tensor:
    noise = torch.randn(2, family.codec.channels, 16, 16, generator=torch.Generator().manual_seed(seed))
    cond = family.encode_prompts([f"a photo of a {word} mug", "a mug"])
    return family.predict(noise, torch.tensor([20, 700]), cond, [Geometry((40, 48), (0, 4), (32, 32))] * 2)


def weights(family: Family) -> dict[str, Tensor]:
    return {f"{part}.{n}": p.detach().clone() for part, m in family.parts.items() for n, p in m.named_parameters()}


def train_a_little(family: Family, trained: Parameters, word: str = "zwx") -> None:
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    for step in range(2):
        predict(family, step, word).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def _wanting(part: str, module: nn.Module) -> list[str]:
    return [f"{part}.{n}" for n, p in module.named_parameters() if p.requires_grad]
