"""What every method promises for every family. Both come from the registries: a new one is tested for nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finetune.core.errors import BadInput
from finetune.families.base import Family
from finetune.families.registry import FAMILIES
from finetune.families.source import load_family
from finetune.methods.lora import LoRA
from finetune.methods.peft_adapter import PeftAdapter
from finetune.methods.registry import METHODS
from finetune.testing import contract
from finetune.testing.contract import predict

PARTS = [["denoiser"], ["text_encoders"], ["denoiser", "text_encoders"]]
ONLY = {"textual_inversion": [["text_encoders"]]}  # kinds that refuse other parts
USUAL = ("lora", "full")  # of the others each part on its own is slow: it runs in .ci/run all the same


def marks(kind: str, parts: list) -> tuple:
    return () if kind in USUAL or parts == ONLY.get(kind, PARTS)[-1] else (pytest.mark.slow,)


CASES = [
    pytest.param(family, kind, parts, id=f"{family}-{kind}-{'+'.join(parts)}", marks=marks(kind, parts))
    for family in FAMILIES
    for kind in METHODS
    for parts in ONLY.get(kind, PARTS)
]
every_case = pytest.mark.parametrize(("name", "kind", "parts"), CASES)


@every_case
def test_only_what_should_move_moves(name: str, kind: str, parts: list, tiny_bases: dict[str, Path]) -> None:
    contract.only_what_should_move_moves(tiny_bases[name], kind, parts)


@every_case
def test_every_trained_weight_gets_a_gradient(name: str, kind: str, parts: list, tiny_bases: dict[str, Path]) -> None:
    contract.every_trained_weight_gets_a_gradient(tiny_bases[name], kind, parts)


@every_case
def test_step_0_is_the_base_and_the_seed_decides(
    name: str, kind: str, parts: list, tiny_bases: dict[str, Path]
) -> None:
    contract.step_0_is_the_base_and_the_seed_decides(tiny_bases[name], kind, parts)


@every_case
def test_saved_and_loaded_is_the_same(name: str, kind: str, parts: list, tiny_bases: dict[str, Path]) -> None:
    contract.saved_and_loaded_is_the_same(tiny_bases[name], kind, parts)


@every_case
def test_checkpointing_gives_the_same_gradients(
    name: str, kind: str, parts: list, tiny_bases: dict[str, Path]
) -> None:
    contract.checkpointing_gives_the_same_gradients(tiny_bases[name], kind, parts)


ADAPTERS = [kind for kind, method in METHODS.items() if issubclass(method, PeftAdapter)]


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("name", list(FAMILIES))
def test_an_adapter_switched_off_is_the_base(name: str, kind: str, tiny_bases: dict[str, Path]) -> None:
    contract.switched_off_is_the_base(tiny_bases[name], kind)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_choice_of_targets_grows(name: str, tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases[name]))
    attention, linear = (set(family.lora_targets("denoiser", c)) for c in ("attention", "all-linear"))
    assert attention < linear
    assert all(path.split(".")[-1].removesuffix("_proj").split("_")[-1] in "q k v 0 out".split() for path in attention)
    if any(isinstance(child, torch.nn.Conv2d) for child in _blocks(family)):
        assert linear < set(family.lora_targets("denoiser", "conv"))
    else:
        with pytest.raises(BadInput, match="all-linear"):
            family.lora_targets("denoiser", "conv")


def _blocks(family: Family) -> list[torch.nn.Module]:
    return [child for path, child in family.parts["denoiser"].named_modules() if "blocks." in path]


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_on_a_bf16_base_are_fp32_and_begin_as_it(kind: str, tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases["sd1"]), dtype=torch.bfloat16)
    before = predict(family)
    trained = METHODS[kind]().attach(family, 0)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert torch.equal(predict(family), before)
    predict(family).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained.values())
    assert family.parts["denoiser"].conv_in.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(("stabilised", "scale"), [(False, 12 / 4), (True, 12 / 4**0.5)])
def test_the_adapter_is_the_papers_formula(stabilised: bool, scale: float, tiny_bases: dict[str, Path]) -> None:
    """arXiv:2106.09685 eq. 3 and arXiv:2312.03732: W x + s B A x."""
    family = load_family(str(tiny_bases["sd1"]))
    method = LoRA(rank=4, alpha=12, rank_stabilised=stabilised, targets="attention")
    path = family.lora_targets("denoiser", "attention")[0]
    method.attach(family, 0)
    layer = family.parts["denoiser"].get_submodule(path)
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(3, layer.in_features)
    delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert torch.allclose(layer(x), layer.base_layer(x) + scale * x @ delta.T, atol=1e-5)
