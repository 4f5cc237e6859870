"""Everything else in a training step: the base as its teacher, and penalties that have nothing to do with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_regularizers import METHODS, move
from test_trainer import Memory

from finetune.core.batch import Batch, Role
from finetune.core.rng import normal, uniform
from finetune.families.base import Family
from finetune.families.source import load_family
from finetune.methods.base import Method
from finetune.objectives.registry import build_objective
from finetune.objectives.settings import ObjectiveSettings
from finetune.training.priors.base import PriorSettings
from finetune.training.priors.class_images import ClassImages
from finetune.training.priors.frozen_base import FrozenBase
from finetune.training.priors.none import NoPrior
from finetune.training.priors.others import Others
from finetune.training.regularizers import PriorContext
from finetune.training.step import Step, StepOptions

TAUGHT = NoPrior(others=Others(target="base"))
CLASS_TAUGHT = ClassImages(target="base")
BOTH = ClassImages(target="base", others=Others(target="base"))
WHO = [(TAUGHT, "other"), (CLASS_TAUGHT, "class"), (BOTH, "other"), (BOTH, "class")]
every_kind = pytest.mark.parametrize(("prior", "role"), WHO, ids=["others", "class", "both: others", "both: class"])
every_method = pytest.mark.parametrize("kind", list(METHODS))


def step_of(family: Family, method: Method, prior: PriorSettings, weighting: str = "none") -> Step:
    trained = method.attach(family, 0)
    context = PriorContext(family, method, trained, family.encode_prompts, "a mug")
    objective = build_objective(ObjectiveSettings(weighting=weighting), family.schedule)
    options = StepOptions(regularizers=prior.regularizers(context), teacher=prior.teacher(context))
    step = Step(family, method.part_names(family), objective, family.encode_prompts, options).train()
    step.start = trained  # type: ignore[assignment]
    return step


def mixed(family: Family, *rows: int, role: Role = "other") -> Batch:
    """Four samples, of which these are of everything else, or class images."""
    batch = Memory(channels=family.codec.channels).micro(3, 0)
    return replace(batch, roles=[role if row in rows else "photo" for row in range(4)])


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux"])
@every_method
def test_it_is_zero_at_the_start(name: str, kind: str, tiny_bases: dict[str, Path]) -> None:
    """With trained text encoders, without the dropout that would make both differ."""
    family = load_family(str(tiny_bases[name]))
    method = METHODS[kind].model_copy(update={"dropout": 0.0} if kind == "lora" else {})
    step = step_of(family, method, TAUGHT)
    batch = mixed(family, 0, 1, 2, 3)
    with torch.no_grad():
        assert float(step(batch)) < 1e-9
        move(step.start)  # type: ignore[arg-type]
        assert float(step(batch)) > 1e-6


@every_method
@every_kind
def test_it_is_the_formula(kind: str, prior: PriorSettings, role: Role, tiny_bases: dict[str, Path]) -> None:
    """lambda w(t) |pred(z, t, c) - pred_base(z, t, c)|^2 for two of four samples, with their own captions, the base
    read from disk; the usual loss for the others."""
    family, clean = (load_family(str(tiny_bases["sd1"])) for _ in range(2))
    method = METHODS[kind].model_copy(update={"dropout": 0.0} if kind == "lora" else {})
    step = step_of(family, method, prior, "min_snr")
    move(step.start)  # type: ignore[arg-type]
    batch, total = mixed(family, 1, 2, role=role), 0.0
    with torch.no_grad():
        measured = float(step(batch))
        for k, draw in enumerate(batch.keys):
            noise = normal([draw], (4, 16, 16), "noise")[0]
            x0 = batch.latents.mean[k] + batch.latents.std[k] * normal([draw], (4, 16, 16), "vae")[0]
            t = int(float(uniform([draw], "timestep")) * 1000)
            abar = family.drawing.scheduler.alphas_cumprod[t]
            noisy = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
            ours, theirs = (
                one.predict(
                    noisy[None], torch.tensor([t]), one.encode_prompts([batch.prompts[k]]), [batch.geometry[k]]
                )[0]
                for one in (family, clean)
            )
            target = theirs if k in (1, 2) else noise
            snr = float(abar / (1 - abar))
            total += min(snr, 5) / snr * float(batch.weight[k]) * float((ours - target).square().mean())
    assert measured == pytest.approx(total / 4, rel=1e-3)


def test_its_gradient_goes_through_the_trained_model_alone(tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases["sd1"]))
    step = step_of(family, METHODS["full"], TAUGHT)
    move(step.start)  # type: ignore[arg-type]
    step(mixed(family, 0, 1, 2, 3)).backward()
    assert all(p.grad is not None for p in step.start.values())  # type: ignore[union-attr, operator]
    with step.options.teacher.base() as base:  # type: ignore[union-attr]
        assert all(p.grad is None for p in base.parts["denoiser"].parameters())


@pytest.mark.parametrize(("prior", "role"), [(TAUGHT, "class"), (CLASS_TAUGHT, "other"), (CLASS_TAUGHT, "photo")])
def test_nobody_else_is_taught(prior: PriorSettings, role: Role, tiny_bases: dict[str, Path]) -> None:
    """Samples of another kind have the usual target."""
    family = load_family(str(tiny_bases["sd1"]))
    taught = step_of(family, METHODS["lora"].model_copy(update={"dropout": 0.0}), prior)
    move(taught.start)  # type: ignore[arg-type]
    with torch.no_grad():
        found = float(taught(mixed(family, 1, 2, role=role)))
        taught.options = StepOptions()
        assert found == float(taught(mixed(family, 1, 2, role=role)))


@every_method
def test_a_step_without_it_has_the_bits_of_before(kind: str, tiny_bases: dict[str, Path]) -> None:
    """Roles alone change nothing, and a teacher without pupils neither."""
    family = load_family(str(tiny_bases["sd1"]))
    step = step_of(family, METHODS[kind], NoPrior())
    assert step.options.teacher is None
    move(step.start)  # type: ignore[arg-type]
    with torch.no_grad():
        wanted = step(replace(mixed(family), roles=[]))
        assert torch.equal(step(mixed(family)), wanted)
        step.options = StepOptions(teacher=lambda at, target: target if not at.batch.rows_of("other") else 1 / 0)
        assert torch.equal(step(mixed(family)), wanted)


def test_frozen_base_holds_the_photos_to_the_class_prompt_and_nothing_else(tiny_bases: dict[str, Path]) -> None:
    """Its penalty is that of the photos alone, over all samples; with dropout, which must find its samples."""
    family = load_family(str(tiny_bases["sd1"]))
    step = step_of(family, METHODS["lora"], FrozenBase(weight=0.7, others=Others()))
    move(step.start)  # type: ignore[arg-type]
    plain = replace(step.options, regularizers=())
    penalised, found = step.options, {}
    batch = mixed(family, 1, 2)
    photos = replace(batch.part([0, 3]), roles=[])
    with torch.no_grad():
        for name, samples in (("all", batch), ("photos", photos)):
            step.options = penalised
            whole = float(step(samples))
            step.options = plain
            found[name] = whole - float(step(samples))
    assert found["photos"] > 1e-4
    assert found["all"] == pytest.approx(found["photos"] / 2, rel=1e-3)
