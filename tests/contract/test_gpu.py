"""On a CUDA device: every family x method trains, resumes bit for bit in deterministic mode and draws as the CPU does.

`CUDA_VISIBLE_DEVICES=0 pytest -m gpu`; tests/conftest.py hides the GPUs from all other tests.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from finetune.core.batch import Geometry
from finetune.core.determinism import deterministic
from finetune.core.errors import CheckFailed
from finetune.data.cache import PromptCache
from finetune.families.registry import FAMILIES
from finetune.families.source import load_family
from finetune.methods.base import Method
from finetune.methods.registry import METHODS
from finetune.optim.paged_adamw8bit import PagedAdamW8bit
from finetune.optim.registry import OPTIMISERS
from finetune.optim.state import load_state_tensors, state_tensors
from finetune.sampling.draw import draw
from finetune.sampling.settings import Sampling
from finetune.testing import contract
from finetune.testing.contract import ShortRun, train
from finetune.training.accelerate import resolve_precision
from finetune.training.checkpoint import to_cpu
from finetune.training.fast import quickened
from finetune.training.settings import Run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]
CASES = [(family, kind) for family in FAMILIES for kind in METHODS]


@pytest.fixture(autouse=True)
def _own_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_killed_and_resumed_is_the_unbroken_run(
    family: str, kind: str, tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    with deterministic(True):
        wanted = train(tiny_bases[family], kind, whole, ShortRun(device="cuda"))
        with pytest.raises(CheckFailed):
            train(tiny_bases[family], kind, cut, ShortRun(bad=2, device="cuda"))
        resumed = train(tiny_bases[family], kind, cut, ShortRun(device="cuda"))
    assert all(value.device.type == "cuda" for value in wanted.values())
    assert all(torch.equal(wanted[name], resumed[name]) for name in wanted)


def test_auto_is_a_half_precision() -> None:
    assert resolve_precision(Run()) in ("bf16", "fp16")


@pytest.mark.parametrize("optim", OPTIMISERS)
def test_with_every_optimiser_too(optim: str, tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    settings = OPTIMISERS[optim]()
    with deterministic(True):
        contract.killed_and_resumed_is_the_unbroken_run(tiny_bases["sd1"], "lora", tmp_path, settings, device="cuda")


def test_paged_moments_are_paged_after_a_resume_too() -> None:
    """bitsandbytes pages tensors of 100 000 numbers and more; the run that goes on has the unbroken one's bits."""

    def made() -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(2**18, device="cuda"))
        return parameter, PagedAdamW8bit(lr=1e-2).build({"denoiser.x": parameter})

    def step(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer, n: int) -> None:
        parameter.grad = torch.randn(2**18, generator=torch.Generator().manual_seed(n)).cuda()
        optimizer.step()

    whole, cut, again = made(), made(), made()
    for n in range(4):
        step(*whole, n)
    for n in range(2):
        step(*cut, n)
    tensors, values = state_tensors(cut[1])
    again[0].data.copy_(cut[0].data)
    load_state_tensors(again[1], to_cpu(tensors), values)
    assert all(getattr(again[1].state[again[0]][key], "is_paged", False) for key in ("state1", "state2"))
    for n in range(2, 4):
        step(*again, n)
    assert torch.equal(whole[0], again[0])


@pytest.mark.parametrize("name", list(FAMILIES))
def test_prompts_and_images_are_the_cpus(name: str, tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    here, there = load_family(str(tiny_bases[name])), load_family(str(tiny_bases[name]))
    there.to("cuda")
    wanted = here.encode_prompts(["a photo of zwx mug"])
    cache = PromptCache(there, "base", tmp_path)
    cache.fill(["a photo of zwx mug"])
    for key, value in cache(["a photo of zwx mug"]).items():
        assert value.device.type == "cuda"
        assert torch.allclose(value.cpu(), wanted[key], atol=1e-4)
    images = [
        draw(family, ["a mug"], Sampling(sampler=None, steps=2, size=32), seeds=[0])[0] for family in (here, there)
    ]
    difference = np.abs(np.asarray(images[0], dtype=float) - np.asarray(images[1], dtype=float))
    assert difference.mean() < 1


@pytest.mark.parametrize("kind", list(METHODS))
def test_trained_weights_lie_where_the_base_does(kind: str, tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases["sdxl"]), dtype=torch.bfloat16)
    family.parts.to("cuda")
    method: Method = METHODS[kind]()
    method.add_subject_token(family, "zwx", "mug")
    assert all(value.device.type == "cuda" for value in method.attach(family, 0).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fused_lora_is_pefts(dtype: torch.dtype, tiny_bases: dict[str, Path]) -> None:
    """`run.fast=on`: loss and gradients of a step, with autocast where a run has it."""
    found = []
    family = load_family(str(tiny_bases["sdxl"]), dtype=dtype)
    family.parts.to("cuda")
    trained = METHODS["lora"](kind="lora").attach(family, 0)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(trained.items()):
            if ".lora_B." in name:
                made = torch.Generator().manual_seed(number)
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=made))
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)).to("cuda")
    cond, t = family.encode_prompts(["a photo of a zwx mug", "a mug"]), torch.tensor([20, 700], device="cuda")
    geometry = [Geometry((40, 48), (0, 4), (32, 32))] * 2
    for wanted in (False, True):
        mixed = torch.autocast("cuda", torch.float16, enabled=dtype == torch.float16)
        with quickened(family.parts.values(), wanted, device=torch.device("cuda")), mixed:
            loss = family.predict(noise, t, cond, geometry).float().square().mean()
        (1024 * loss).backward()
        found.append((float(loss), torch.cat([p.grad.flatten() for p in trained.values() if p.grad is not None])))
        for parameter in trained.values():
            parameter.grad = None
    (plain, slopes), (fast, fused) = found
    near = 1e-4 if dtype == torch.float32 else 3e-2
    assert abs(fast - plain) <= near * plain
    assert (fused - slopes).norm() <= near * slopes.norm()
