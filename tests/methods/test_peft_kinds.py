"""The adapter kinds against their papers' formulas, written here without PEFT; and what of a base they choose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.config.load import parse_recipe
from finetune.core.errors import BadInput
from finetune.families.base import Family
from finetune.families.source import load_family
from finetune.methods.lora import LoRA
from finetune.methods.registry import METHODS

KINDS = ["dora", "loha", "lokr", "oft"]


def attached(base: Path, kind: str, **settings: Any) -> tuple[Any, Family]:
    """A family under an adapter whose weights are all moved away from their start."""
    family, method = load_family(str(base)), METHODS[kind](**settings)
    made = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in method.attach(family, 0).values():
            parameter.add_(torch.randn(parameter.shape, generator=made) * 0.05)
    for part in method.part_names(family):
        family.parts[part].eval()
    return method, family


def dora(base: Tensor, p: dict[str, Tensor], scale: float) -> Tensor:
    """arXiv:2402.09353 eq. 5; the norm over each output's weights, as the authors' code has it."""
    moved = base + scale * (p["lora_B.weight"].flatten(1) @ p["lora_A.weight"].flatten(1)).view_as(base)
    norm = moved.flatten(1).square().sum(1).sqrt()
    factor = p["lora_magnitude_vector.weight"].flatten() / norm
    return factor.view(-1, *[1] * (base.ndim - 1)) * moved


def loha(base: Tensor, p: dict[str, Tensor], scale: float) -> Tensor:
    """arXiv:2108.06098 proposition 1: (X1 Y1^T) * (X2 Y2^T)."""
    one, two = p["hada_w1_a"] @ p["hada_w1_b"], p["hada_w2_a"] @ p["hada_w2_b"]
    return base + scale * (one * two).view_as(base)


def lokr(base: Tensor, p: dict[str, Tensor], scale: float) -> Tensor:
    """kron(C, M): block (i, j) is c_ij M."""
    small = p["lokr_w1"]
    big = p["lokr_w2"] if "lokr_w2" in p else p["lokr_w2_a"] @ p["lokr_w2_b"]
    big = big.view(base.shape[0] // len(small), base.shape[1] // small.shape[1], *base.shape[2:])
    return base + scale * torch.cat([torch.cat([c * big for c in row], 1) for row in small], 0)


def oft(base: Tensor, p: dict[str, Tensor], scale: float) -> Tensor:
    """arXiv:2306.07280 section 3.2: blocks of inputs turned by (I + Q)(I - Q)^-1, Q skew (its sign is PEFT's)."""
    blocks = []
    for row in p["oft_R.weight"].double():
        side = int((1 + (1 + 8 * len(row)) ** 0.5) / 2)
        q = torch.zeros(side, side, dtype=torch.double)
        q[tuple(torch.triu_indices(side, side, 1))] = row
        q = q - q.T
        eye = torch.eye(side, dtype=torch.double)
        turn = torch.linalg.inv(eye + q) @ (eye - q)
        assert torch.allclose(turn @ turn.T, eye, atol=1e-12)
        blocks.append(turn)
    return (base.double() @ torch.block_diag(*blocks).T).float()


FORMULAS = {"dora": dora, "loha": loha, "lokr": lokr, "oft": oft}
SETTINGS: dict[str, dict[str, Any]] = {
    "dora": {"rank": 3, "alpha": 6, "targets": "conv"},
    "loha": {"rank": 3, "alpha": 6, "targets": "conv"},
    "lokr": {"rank": 2, "alpha": 4, "targets": "conv"},
    "oft": {"block_size": 8},
}


def own_parameters(layer: torch.nn.Module) -> dict[str, Tensor]:
    return {
        name.replace(".default", ""): value.detach()
        for name, value in layer.named_parameters()
        if not name.startswith("base_layer.")
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_computes_the_papers_formula_and_deltas_are_its_difference(
    kind: str, tiny_bases: dict[str, Path]
) -> None:
    """Every layer, convolutions too: its output on random input, and the delta that exports are made of."""
    method, family = attached(tiny_bases["sd1"], kind, parts=["denoiser", "text_encoders"], **SETTINGS[kind])
    deltas = {(part, path): value for part, path, value in method.deltas(family)}
    shapes = set()
    for part, path, layer in method.layers(family):
        base = layer.get_base_layer()
        wanted = FORMULAS[kind](base.weight.detach(), own_parameters(layer), 2.0)
        assert torch.allclose(deltas[part, path], wanted - base.weight, atol=2e-6), path
        x = torch.randn(2, base.weight.shape[1], *([6, 6] if wanted.ndim == 4 else []))
        found = layer(x)
        held, base.weight.data = base.weight.data, wanted
        assert torch.allclose(found, base(x), atol=2e-5), path
        base.weight.data = held
        shapes.add(tuple(wanted.shape[2:]))
    assert shapes == ({()} if kind == "oft" else {(), (1, 1), (3, 3)})


@pytest.mark.parametrize("kind", KINDS)
def test_taking_deltas_leaves_the_model_as_it_was(kind: str, tiny_bases: dict[str, Path]) -> None:
    method, family = attached(tiny_bases["sd1"], kind)
    before = {name: value.clone() for name, value in family.parts["denoiser"].state_dict().items()}
    list(method.deltas(family))
    after = family.parts["denoiser"].state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_oft_leaves_convolutions_alone(tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases["sd1"]))
    oft = METHODS["oft"]()
    assert set(oft.target_modules(family, "denoiser")) < set(family.lora_targets("denoiser", "all-linear"))
    recipe = {"data": {"photos": "x", "class_noun": "mug"}, "optim": {"kind": "adamw"}}
    with pytest.raises(BadInput, match=r"method.targets is 'conv'"):
        parse_recipe(recipe | {"method": {"kind": "oft", "targets": "conv"}})


@pytest.mark.parametrize("kind", ["lora", *KINDS])
def test_cross_kv_trains_the_keys_and_values_of_cross_attention_only(kind: str, tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases["sdxl"]))
    trained = METHODS[kind](targets="cross-kv").attach(family, 0)
    modules = {name.split(".attn2.")[1].split(".")[0] for name in trained}  # raises where there is no attn2
    blocks = sum(path.endswith(".attn2") for path, _ in family.parts["denoiser"].named_modules())
    assert modules == {"to_k", "to_v"}
    assert len(list(METHODS[kind](targets="cross-kv").layers(family))) == 2 * blocks


def test_cross_kv_without_cross_attention_is_refused(tiny_bases: dict[str, Path], monkeypatch: Any) -> None:
    family = load_family(str(tiny_bases["sd1"]))
    monkeypatch.setattr(type(family), "lora_targets", lambda self, part, choice: ["blocks.0.attn.to_k"])
    with pytest.raises(BadInput, match="no separate cross attention"):
        LoRA(targets="cross-kv").attach(family, 0)


def test_the_start_of_a_lora(tiny_bases: dict[str, Path]) -> None:
    """default: uniform in +-1/sqrt(in); gaussian: deviation 1/r; B is zero in both."""
    for init in ("default", "gaussian"):
        family = load_family(str(tiny_bases["sd1"]))
        trained = LoRA(rank=4, init=init).attach(family, 0)
        assert all(not bool(value.any()) for name, value in trained.items() if ".lora_B." in name)
        wide = [value.detach() for name, value in trained.items() if ".lora_A." in name and value.ndim == 2]
        if init == "default":
            assert all(float(value.abs().max()) <= value.shape[1] ** -0.5 for value in wide)
        else:
            assert float(torch.cat([value.flatten() for value in wide]).std()) == pytest.approx(1 / 4, rel=0.03)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_no_layer_is_left_out_by_chance(kind: str, tiny_bases: dict[str, Path], monkeypatch: Any) -> None:
    """PEFT draws from the global generator for every such layer; a draw of exactly 0 must not drop it."""
    _, family = attached(tiny_bases["sd1"], kind)
    layer = next(m for m in family.parts["denoiser"].modules() if hasattr(m, "module_dropout"))
    x = torch.randn(2, layer.get_base_layer().weight.shape[1], *[4, 4][: layer.get_base_layer().weight.ndim - 2])
    wanted = layer.eval()(x)
    monkeypatch.setattr(torch, "rand", lambda *size, **kw: torch.zeros(*size))
    assert torch.equal(layer.train()(x), wanted)
