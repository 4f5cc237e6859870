"""The SDXL refiner: what differs from SDXL beside its parts (arXiv:2307.01952 section 2.5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.core.rng import SampleKey
from finetune.export.adapter import adapter_from
from finetune.export.registry import EXPORTS
from finetune.families.base import Family
from finetune.families.source import load_family
from finetune.methods.lora import LoRA
from finetune.objectives.registry import build_objective
from finetune.objectives.settings import ObjectiveSettings
from finetune.training.step import Step, StepOptions


def timesteps(family: Family, stratify: int | None, **settings: Any) -> torch.Tensor:
    objective = build_objective(ObjectiveSettings(**settings), family.schedule)
    step = Step(family, ["denoiser"], objective, family.encode_prompts, StepOptions(stratify=stratify))
    draws = [[SampleKey(0, number, sample) for sample in range(8)] for number in range(50)]
    return torch.cat([step.timesteps(each) for each in draws])


@pytest.mark.parametrize("stratify", [None, 8])
def test_it_is_trained_on_the_lowest_200_noise_levels(stratify: int | None, tiny_bases: dict[str, Path]) -> None:
    """All of them evenly; SDXL itself on all 1000."""
    refiner, base = (timesteps(load_family(str(tiny_bases[n])), stratify) for n in ("sdxl-refiner", "sdxl"))
    assert 190 < refiner.max() < 200
    assert abs(float(refiner.float().mean()) - 99.5) < 4 * 200 / 12**0.5 / 400**0.5
    assert base.max() > 950


@pytest.mark.parametrize("settings", [{"density": "logit_normal"}, {"density": "cosmap"}, {"shift": 3.0}])
def test_every_density_keeps_to_them(settings: dict[str, Any], tiny_bases: dict[str, Path]) -> None:
    """A density was cut off at a fifth of its samples, which reach up to a third of the noise levels and more."""
    refiner, base = (timesteps(load_family(str(tiny_bases[n])), None, **settings) for n in ("sdxl-refiner", "sdxl"))
    assert refiner.max() < 200
    assert (refiner - base * 0.2).abs().max() <= 1


def test_no_ui_is_named_for_its_files(tiny_bases: dict[str, Path]) -> None:
    for name, readers in (("sdxl-refiner", {"diffusers"}), ("sdxl", set(EXPORTS["kohya"]().read_by))):
        family, method = load_family(str(tiny_bases[name])), LoRA(rank=2)
        method.attach(family, 0)
        assert set(EXPORTS["kohya"]().readers(adapter_from(method, family))) == readers
