"""What every method promises for every family. Both come from the registries: a new one is tested for nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finetune.core.batch import Geometry
from finetune.core.errors import BadInput
from finetune.families.base import Family
from finetune.families.registry import FAMILIES
from finetune.families.source import load_family
from finetune.methods.base import Method
from finetune.methods.lora import LoRA
from finetune.methods.peft_adapter import PeftAdapter
from finetune.methods.registry import METHODS

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


def attached(kind: str, parts: list, family: Family, seed: int = 0) -> tuple[Method, dict, str]:
    """A method on a family, what it trains, and the word for the subject: `zwx`, or a new one that begins as it."""
    method = METHODS[kind](parts=parts)
    word = method.add_subject_token(family, "zwx", "zwx") or "zwx"
    return method, method.attach(family, seed), word


def predict(family: Family, seed: int = 0, word: str = "zwx") -> torch.Tensor:
    noise = torch.randn(2, family.latent_channels, 16, 16, generator=torch.Generator().manual_seed(seed))
    cond = family.encode_prompts([f"a photo of a {word} mug", "a mug"])
    return family.predict(noise, torch.tensor([20, 700]), cond, [Geometry((40, 48), (0, 4), (32, 32))] * 2)


def weights(family: Family) -> dict[str, torch.Tensor]:
    return {f"{part}.{n}": p.detach().clone() for part, m in family.parts.items() for n, p in m.named_parameters()}


def train_a_little(family: Family, trained: dict, word: str = "zwx") -> None:
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    for step in range(2):
        predict(family, step, word).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@every_case
def test_only_what_should_move_moves(name: str, kind: str, parts: list, tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases[name]))
    base = weights(family)
    _, trained, word = attached(kind, parts, family)
    start = {n: p.detach().clone() for n, p in trained.items()}
    train_a_little(family, trained, word)
    after = weights(family)
    for n, value in base.items():
        held = after.get(n, after.get(n.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")))
        if n not in trained:
            assert torch.equal(held, value), n
    moved = [n for n, value in start.items() if not torch.equal(trained[n], value)]
    assert set(moved) == set(trained)
    assert all(p.dtype == torch.float32 for p in trained.values())
    assert {n for part, m in family.parts.items() for n in _wanting(part, m)} == set(trained)


def _wanting(part: str, module: torch.nn.Module) -> list[str]:
    return [f"{part}.{n}" for n, p in module.named_parameters() if p.requires_grad]


@every_case
def test_every_trained_weight_gets_a_gradient(name: str, kind: str, parts: list, tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases[name]))
    _, trained, word = attached(kind, parts, family)
    predict(family, 0, word).square().mean().backward()
    assert [n for n, p in trained.items() if p.grad is None] == []


@every_case
def test_step_0_is_the_base_and_the_seed_decides(
    name: str, kind: str, parts: list, tiny_bases: dict[str, Path]
) -> None:
    family, again = (load_family(str(tiny_bases[name])) for _ in range(2))
    before = predict(family)
    _, first, word = attached(kind, parts, family)
    assert torch.equal(predict(family, 0, word), before)
    _, second, _ = attached(kind, parts, again)
    assert all(torch.equal(first[n], second[n]) for n in first)


@every_case
def test_saved_and_loaded_is_the_same(name: str, kind: str, parts: list, tiny_bases: dict[str, Path]) -> None:
    family, again = (load_family(str(tiny_bases[name])) for _ in range(2))
    method, trained, word = attached(kind, parts, family)
    train_a_little(family, trained, word)
    attached(kind, parts, again, 5)
    assert not torch.equal(predict(family, 0, word), predict(again, 0, word))
    state = method.state_dict(family)
    method.load_state_dict(again, state)
    assert torch.equal(predict(family, 0, word), predict(again, 0, word))
    state.pop(next(iter(state)))
    with pytest.raises(BadInput):
        method.load_state_dict(again, state)


@every_case
def test_checkpointing_gives_the_same_gradients(
    name: str, kind: str, parts: list, tiny_bases: dict[str, Path]
) -> None:
    gradients = []
    for checkpointing in (False, True):
        family = load_family(str(tiny_bases[name]))
        method, trained, word = attached(kind, parts, family)
        for part in method.part_names(family):
            family.parts[part].train()
        if checkpointing:
            family.enable_gradient_checkpointing(method.part_names(family))
        predict(family, 0, word).square().mean().backward()
        gradients.append({n: p.grad for n, p in trained.items()})
    for n, value in gradients[0].items():
        assert torch.allclose(value, gradients[1][n], rtol=1e-4, atol=1e-7), n


ADAPTERS = [kind for kind, method in METHODS.items() if issubclass(method, PeftAdapter)]


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("name", list(FAMILIES))
def test_an_adapter_switched_off_is_the_base(name: str, kind: str, tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases[name]))
    before = predict(family)
    method = METHODS[kind](parts=["denoiser", "text_encoders"])
    train_a_little(family, method.attach(family, 0))
    assert not torch.equal(predict(family), before)
    with method.disabled(family):
        assert torch.equal(predict(family), before)
    assert not torch.equal(predict(family), before)


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
