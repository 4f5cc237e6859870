"""bf16 and fp16 with real numbers, on the CPU: the loop's ways of computing against the same step in fp32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_trainer import Memory

from finetune.core.batch import Geometry
from finetune.families.registry import FAMILIES
from finetune.families.source import load_family
from finetune.methods.registry import METHODS
from finetune.objectives.registry import build_objective
from finetune.objectives.settings import ObjectiveSettings
from finetune.sampling.draw import draw
from finetune.sampling.settings import Sampling
from finetune.training.dropout import SampleDropout
from finetune.training.priors.distance import Distance
from finetune.training.priors.frozen_base import FrozenBase
from finetune.training.regularizers import PriorContext
from finetune.training.step import Step, StepOptions

BF16, FP16 = torch.bfloat16, torch.float16
ONLY = {"textual_inversion": ["text_encoders"]}
KINDS = [(name, kind) for name in FAMILIES for kind in ("lora", "full")]
KINDS += [("sd1", kind) for kind in METHODS if kind not in ("lora", "full")]


def one_step(
    base: Path, kind: str, dtype: torch.dtype, cast: torch.dtype | None, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and the gradient of all that trains, away from the start (so that B is not zero).

    `dtype`: the base's; `cast`: autocast's. Dropout is off: its masks are drawn for a layer's own dtype.
    """
    family = load_family(str(base), dtype=dtype)
    method = METHODS[kind](parts=ONLY.get(kind, ["denoiser", "text_encoders"]))
    word = method.add_subject_token(family, "zwx", "zwx") or "zwx"
    trained = method.attach(family, 0)
    attached = PriorContext(family, method, trained, family.encode_prompts, "a mug")
    regularizers = FrozenBase().regularizers(attached)
    if method.measures_distance:
        regularizers += Distance().regularizers(attached)
    made = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained.values():
            parameter += 0.02 * torch.randn(parameter.shape, generator=made)
    objective = build_objective(ObjectiveSettings(), family.schedule)
    options = StepOptions(regularizers=regularizers)
    step = Step(family, method.part_names(family), objective, family.encode_prompts, options).train()
    for module in step.modules():
        if isinstance(module, SampleDropout):
            module.p = 0.0
    batch = Memory(channels=family.codec.channels).micro(2, 0)
    batch = replace(batch, prompts=[prompt.replace("zwx", word) for prompt in batch.prompts])
    with torch.autocast("cpu", dtype=cast or BF16, enabled=cast is not None):
        loss = step(batch)
    (loss * scale).backward()
    assert {parameter.grad.dtype for parameter in trained.values() if parameter.grad is not None} == {torch.float32}
    return loss.detach(), torch.cat([p.grad.flatten() for p in trained.values() if p.grad is not None]) / scale


@pytest.fixture(scope="module")
def in_fp32(tiny_bases: dict[str, Path]) -> Callable[[str, str], tuple[torch.Tensor, torch.Tensor]]:
    """The step that those in half precision are held to; computed once."""
    return cache(lambda name, kind: one_step(tiny_bases[name], kind, torch.float32, None))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_step_in_half_precision_is_the_step(
    name: str, kind: str, dtype: torch.dtype, tiny_bases: dict[str, Path], in_fp32: Callable[..., Any]
) -> None:
    """As the loop has it: an adapter on a base that is cast once (fp16 also under autocast), full training in fp32
    weights under autocast, fp16 with the loss scaled by GradScaler's first 65536.

    Each value is rounded by at most half an epsilon, some hundred times between latents and gradient. Were the
    roundings independent, that would add up to about ten times half an epsilon; measured are 1 to 10 epsilons of the
    gradient's norm, the same number in bf16 and fp16 although their epsilons differ by 8. The loss is a mean over a
    thousand values, where they cancel (measured: .06).
    """
    base, adapter = tiny_bases[name], METHODS[kind]().is_adapter
    loss, gradient = in_fp32(name, kind)
    cast = dtype if dtype == FP16 or not adapter else None
    held = dtype if adapter else torch.float32
    rounded, found = one_step(base, kind, held, cast, 65536.0 if dtype == FP16 else 1.0)
    eps = torch.finfo(dtype).eps
    assert rounded.dtype == torch.float32
    assert float(gradient.norm()) > 0
    assert bool(found.isfinite().all())
    assert abs(float(rounded / loss) - 1) < 0.5 * eps
    assert 0 < float((found - gradient).norm() / gradient.norm()) < 16 * eps


@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16], ids=str)
@pytest.mark.parametrize("name", ["sdxl", "sdxl-refiner"])
def test_sizes_are_told_exactly(name: str, dtype: torch.dtype, tiny_bases: dict[str, Path]) -> None:
    """bf16 has eight bits: 1365 would be 1368, and the sine of another number."""
    family = load_family(str(tiny_bases[name]), dtype=dtype)
    read: list[torch.Tensor] = []
    family.parts["denoiser"].add_time_proj.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    cond = family.encode_prompts(["a mug"])
    prediction = family.predict(noise, torch.tensor([20]), cond, [Geometry((1365, 4095), (7, 301), (1023, 1025))])
    assert prediction.dtype == dtype
    assert read[0][:4].tolist() == [1365, 4095, 7, 301]


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_full_training_in_bf16_is_drawn_in_bf16_and_its_vae_in_fp32(name: str, tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases[name]))
    plain = draw(family, ["a mug"], Sampling(steps=2), seeds=[0])[0]
    seen: dict[str, set[torch.dtype]] = {"denoiser": set(), "vae": set()}
    for part, found in seen.items():
        for module in family.parts[part].modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(lambda m, inputs, out, found=found: found.add(out.dtype))
    family.autocast = torch.bfloat16
    half = draw(family, ["a mug"], Sampling(steps=2), seeds=[0])[0]
    assert seen == {"denoiser": {torch.bfloat16}, "vae": {torch.float32}}
    difference = np.abs(np.asarray(plain, dtype=float) - np.asarray(half, dtype=float))
    assert 0 < difference.mean() < 8
