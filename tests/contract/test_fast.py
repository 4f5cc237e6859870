"""`run.fast`: the faster layers give the plain path's loss and gradients, for every family x method, and resume."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from PIL import Image
from torch import Tensor, nn

from finetune.config.load import parse_recipe
from finetune.families.registry import FAMILIES
from finetune.families.source import load_family
from finetune.jobs.train import train
from finetune.methods.layers import fused_lora, products, winograd
from finetune.methods.layers.fused_lora import FusedLinear
from finetune.methods.lora import LoRA
from finetune.methods.registry import METHODS
from finetune.methods.start import tuner_layers
from finetune.testing import contract
from finetune.testing.contract import attached, predict
from finetune.training.fast import is_worthwhile, most_bytes, quickened

pytestmark = pytest.mark.skipif(not products.has_packed_convolutions(), reason="no AVX-512: fast is the plain path")
CASES = [
    pytest.param(family, kind, marks=() if kind == "lora" else pytest.mark.slow)
    for family in FAMILIES
    for kind in METHODS
]


@pytest.fixture
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small layers count as large ones, so that all of them take the other path."""
    monkeypatch.setattr(products, "LEAST_WORK", 1)
    monkeypatch.setattr(products, "LEAST_CONVOLUTION", 1)
    monkeypatch.setattr(products, "LEAST_WINOGRAD", 1)
    monkeypatch.setattr(products, "LEAST_CHANNELS", 1)
    monkeypatch.setattr(products, "MOST_PIXELS", 10**9)
    monkeypatch.setattr(products, "has_faster_products", lambda: True)


def moved(trained: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The parameters, moved a little: a new adapter's B is zero, and then A has no gradient."""
    generator = torch.Generator().manual_seed(3)
    for parameter in trained.values():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return trained


def gradients(loss: Tensor, trained: dict[str, nn.Parameter]) -> Tensor:
    loss.backward()
    found = torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in trained.values()]
    )
    for parameter in trained.values():
        parameter.grad = None
    return found.double()


def both_ways(family, trained: dict[str, nn.Parameter], word: str = "zwx") -> list[tuple[float, Tensor]]:
    found = []
    for wanted in (False, True):
        with quickened(family.parts.values(), wanted):
            loss = predict(family, 0, word).double().square().mean()  # its sum adds no rounding
            found.append((float(loss.detach()), gradients(loss, trained)))
    return found


def is_equal_but_for_rounding(plain: tuple[float, Tensor], fast: tuple[float, Tensor]) -> None:
    assert abs(fast[0] - plain[0]) <= 2e-7 * abs(plain[0])
    assert (fast[1] - plain[1]).norm() <= 3e-6 * plain[1].norm() != 0


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.usefixtures("every_size")
def test_loss_and_gradients_are_the_plain_paths(name: str, kind: str, tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases[name]))
    parts = ["text_encoders"] if kind == "textual_inversion" else ["denoiser", "text_encoders"]
    _, trained, word = attached(kind, parts, family)
    is_equal_but_for_rounding(*both_ways(family, moved(trained), word))


@pytest.mark.parametrize("targets", ["attention", "conv"])
@pytest.mark.parametrize("least_winograd", [1, 10**12])
@pytest.mark.usefixtures("every_size")
def test_convolutions_have_their_lora_too(
    targets: str, least_winograd: int, tiny_bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that are packed for oneDNN, since Winograd would not pay."""
    monkeypatch.setattr(products, "LEAST_WINOGRAD", least_winograd)
    family = load_family(str(tiny_bases["sd1"]))
    trained = moved(LoRA(rank=3, alpha=1, targets=targets).attach(family, 0))
    plain, fast = both_ways(family, trained)
    is_equal_but_for_rounding(plain, fast)
    kinds = {type(module).__name__ for _, module in tuner_layers(family.parts["denoiser"])}
    assert ("Conv2d" in kinds) == (targets == "conv")


def both_convolutions(fast: products.FrozenConv2d, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The output and the gradient of the input, of torch's convolution in fp64 and of the faster one."""
    plain = nn.Conv2d(*fast.weight.shape[1::-1], fast.kernel_size, fast.stride, fast.padding, dtype=torch.float64)
    plain.load_state_dict(fast.state_dict())
    found = []
    for module, values in ((plain, x.double()), (fast, x.float())):
        values = values.requires_grad_()
        output = module(values)
        output.backward(torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape).sin())
        found.append((output.detach().double(), values.grad.double()))
    return found


def frozen_convolution(channels: int, filters: int, size: int = 3, stride: int = 1) -> products.FrozenConv2d:
    torch.manual_seed(1)
    module = nn.Conv2d(channels, filters, size, stride, size // 2).requires_grad_(False)
    module.__class__ = products.FrozenConv2d
    return module


@pytest.mark.parametrize("sides", [(8, 8), (5, 7), (1, 1), (2, 3), (64, 32), (70, 61)])
@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (1, 1)])
@pytest.mark.usefixtures("every_size")
def test_a_convolution_is_as_exact_as_torchs(sides: tuple[int, int], size: int, stride: int) -> None:
    """Winograd's (arXiv:1509.09308), also of odd sizes, of images that it takes one by one, and with a stride."""
    x = torch.randn(3, 5, *sides, generator=torch.Generator().manual_seed(2))
    plain, fast = both_convolutions(frozen_convolution(5, 7, size, stride), x)
    for wanted, found in zip(plain, fast, strict=True):
        assert found.shape == wanted.shape
        assert (found - wanted).norm() <= 3e-7 * wanted.norm()


@pytest.mark.parametrize(
    ("size", "stride", "padding", "dtype"),
    [
        ((1, 1), 1, (0, 1), torch.float32),
        ((3, 1), 1, (1, 1), torch.float32),
        ((3, 3), 1, (1, 1), torch.float64),
        ((1, 1), 1, (0, 0), torch.float64),
    ],
)
@pytest.mark.usefixtures("every_size")
def test_what_the_kernels_do_not_know_is_torchs(
    size: tuple[int, int], stride: int, padding: tuple[int, int], dtype: torch.dtype
) -> None:
    module = nn.Conv2d(5, 7, size, stride, padding, dtype=dtype).requires_grad_(False)
    x = torch.randn(2, 5, 8, 8, dtype=dtype)
    wanted = module(x)
    with quickened([module], True):
        assert torch.equal(module(x), wanted)
        assert module(x[:0]).shape == wanted[:0].shape


@pytest.mark.usefixtures("every_size")
def test_a_large_image_is_taken_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its transformed inputs would be four times as large as itself, all at once."""
    tiles: list[int] = []
    monkeypatch.setattr(products, "product", lambda x, weight, bias=None: tiles.append(len(x)) or x @ weight.t())
    both_convolutions(frozen_convolution(5, 7), torch.randn(1, 5, 128, 128))
    assert max(tiles) <= winograd.MOST_TILES < sum(tiles) / 16


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.usefixtures("every_size")
def test_merged_convolutions_are_computed_with_their_new_weights(safe: bool, tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases["sd1"]))
    moved(LoRA(rank=2, targets="conv").attach(family, 0))
    layers = [layer for _, layer in tuner_layers(family.parts["denoiser"])]
    with torch.no_grad(), quickened(family.parts.values(), True):
        tuned = predict(family)
        for act in (lambda layer: layer.merge(safe_merge=safe), lambda layer: layer.unmerge()):
            for layer in layers:
                act(layer)
            assert torch.allclose(predict(family), tuned, atol=1e-5)


@pytest.mark.usefixtures("every_size")
def test_another_weight_is_never_taken_for_the_first() -> None:
    """Also where it lies at the address that the first one had."""
    module, x = frozen_convolution(5, 7), torch.randn(1, 5, 8, 8)
    for number in range(20):
        module.weight.data = torch.empty(0)
        module.weight.data = torch.full((7, 5, 3, 3), float(number))
        assert torch.allclose(module(x), nn.functional.conv2d(x, module.weight, module.bias, padding=1), atol=1e-3)


def test_wide_convolutions_take_less_multiplications(monkeypatch: pytest.MonkeyPatch) -> None:
    """SD1.5's convolutions at 256 pixels do; small ones, where the operations around it cost more, do not."""
    taken = []
    original = products.convolve
    monkeypatch.setattr(products, "convolve", lambda *values: taken.append(1) or original(*values))
    for channels, side, counts in [(320, 32, 2), (640, 16, 2), (64, 16, 0), (160, 4, 0)]:
        taken.clear()
        both_convolutions(frozen_convolution(channels, channels), torch.zeros(2, channels, side, side))
        assert len(taken) == counts, (channels, side)


def test_both_ways_share_one_form_of_the_weights() -> None:
    module = frozen_convolution(320, 320)
    both_convolutions(module, torch.zeros(2, 320, 32, 32))
    assert list(module.__dict__["_packs"]) == ["weight", "transformed"]


@pytest.mark.parametrize("kind", ["lora", pytest.param("dora", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("every_size")
def test_killed_and_resumed_is_the_unbroken_run(kind: str, tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    contract.killed_and_resumed_is_the_unbroken_run(tiny_bases["sd1"], kind, tmp_path, fast=True, dropout=0.1)


@pytest.mark.usefixtures("every_size")
def test_afterwards_every_module_is_what_it_was(tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases["sd1"]))
    trained = LoRA(rank=2, targets="conv").attach(family, 0)
    denoiser = family.parts["denoiser"]
    before = {name: type(module) for name, module in denoiser.named_modules()}
    names = list(denoiser.state_dict())
    with quickened(family.parts.values(), True):
        inside = {type(module).__name__ for module in denoiser.modules()}
        predict(family).square().mean().backward()
        assert list(denoiser.state_dict()) == names
        assert torch.equal(predict(family), predict_with(copy.deepcopy(denoiser), family))
    assert inside >= {"FrozenLinear", "FrozenConv2d", "FusedLinear", "FusedConv2d"}
    assert {name: type(module) for name, module in denoiser.named_modules()} == before
    assert not any("_packs" in module.__dict__ for module in denoiser.modules())
    assert all(parameter.requires_grad for parameter in trained.values())


@pytest.mark.parametrize(
    ("setting", "device", "width", "wanted"),
    [
        ("auto", "cpu", 10_000, True),
        ("auto", "cpu", 9_999, False),
        ("auto", "cuda", 10_000, False),
        ("on", "cpu", 1, True),
        ("on", "cuda", 1, True),
        ("on", "mps", 10_000, False),
        ("off", "cpu", 10_000, False),
    ],
)
def test_large_bases_on_a_cpu_take_faster_kernels_by_themselves(
    setting: str, device: str, width: int, wanted: bool
) -> None:
    """100 million parameters are large, as the denoiser of every published base is."""
    denoiser = nn.Linear(width, 10_000, bias=False, device="meta")
    assert is_worthwhile(setting, torch.device(device), denoiser) == wanted
    assert is_worthwhile(setting, torch.device(device), denoiser, compiled=True) == (wanted and device == "cpu")


def test_what_convolutions_would_hold_is_counted_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Conv2d(64, 32, 3).requires_grad_(False)
    assert most_bytes([module]) == 2 * 64 * 32 * 9 * 4
    assert most_bytes([nn.Conv2d(64, 32, 3)]) == 0  # it is trained
    monkeypatch.setattr("finetune.training.fast.memory_of_machine", lambda: 4 * 2 * 64 * 32 * 9 * 4)
    assert most_bytes([module]) > 0
    assert most_bytes([module], processes=2) == 0  # each holds its own
    monkeypatch.setattr("finetune.training.fast.memory_of_machine", lambda: 4 * 2 * 64 * 32 * 9 * 4 - 1)
    assert most_bytes([module]) == 0


def predict_with(denoiser: nn.Module, family) -> Tensor:
    own, family.parts["denoiser"] = family.parts["denoiser"], denoiser
    try:
        return predict(family)
    finally:
        family.parts["denoiser"] = own


@pytest.mark.usefixtures("every_size")
def test_where_the_layers_are_peft_computes_what_is_not_one_plain_lora(tiny_bases: dict[str, Path]) -> None:
    """Switched off, merged into the base, in autocast, or beside a second adapter."""
    family = load_family(str(tiny_bases["sd1"]))
    method = LoRA(rank=2)
    moved(method.attach(family, 0))
    layers = [layer for _, layer in tuner_layers(family.parts["denoiser"])]
    clean = load_family(str(tiny_bases["sd1"]))
    with torch.no_grad(), quickened(family.parts.values(), True):
        tuned = predict(family)
        with method.disabled(family):
            assert torch.allclose(predict(family), predict(clean), atol=1e-5)
        for layer in layers:
            layer.merge()
        assert torch.allclose(predict(family), tuned, atol=1e-5)
        for layer in layers:
            layer.unmerge()
        assert torch.allclose(predict(family), tuned, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            halved = predict(family)
        config = LoraConfig(r=2, lora_alpha=2, init_lora_weights=False)
        for layer in layers:
            layer.update_layer("second", r=2, lora_alpha=2, init_lora_weights=False, config=config)
            layer.set_adapter(["default", "second"])
        several = predict(family)
    with torch.no_grad():
        assert torch.allclose(predict(family), several, atol=1e-5)
        assert not torch.allclose(several, tuned, atol=1e-3)
        for layer in layers:
            layer.set_adapter(["default"])
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(predict(family), halved)


@pytest.mark.parametrize("targets", ["all-linear", "conv"])
@pytest.mark.usefixtures("every_size")
def test_on_a_bf16_base_it_is_no_farther_from_fp32_than_peft_is(targets: str, tiny_bases: dict[str, Path]) -> None:
    """The factors and their gradients stay fp32. Each way rounds at other places: gradients may be a tenth farther,
    and the loss, which is one number, may be off by a unit of bf16 (4e-3)."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        family = load_family(str(tiny_bases["sd1"]), dtype=dtype)
        trained = moved(LoRA(rank=2, targets=targets).attach(family, 0))
        found += both_ways(family, trained)
        assert all(parameter.dtype == torch.float32 for parameter in trained.values())
    (loss, gradient), _, plain, fast = found
    assert abs(fast[0] - loss) <= 4e-3 * loss
    assert (fast[1] - gradient).norm() <= 1.1 * (plain[1] - gradient).norm()
    assert not torch.equal(fast[1], plain[1])


GPU = torch.device("cuda")


@pytest.mark.parametrize("name", ["sd1", "flux"])
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
def test_what_a_gpu_computes_is_the_plain_path_too(
    name: str, dtype: torch.dtype, autocast: bool, tiny_bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The function that layers on a GPU have, on the CPU. Exact in fp32; in bf16, with autocast and without, no
    farther from fp32 than PEFT is."""
    monkeypatch.setattr(fused_lora, "is_on_cpu", lambda x: False)
    asked: list[torch.dtype] = []
    apply = fused_lora._LoraLinear.apply
    monkeypatch.setattr(fused_lora._LoraLinear, "apply", lambda x, *rest: [asked.append(x.dtype), apply(x, *rest)][1])
    found = []
    for own in (torch.float32, dtype):
        family = load_family(str(tiny_bases[name]), dtype=own)
        trained = moved(LoRA(rank=2).attach(family, 0))
        for wanted in (False, True):
            mixed = torch.autocast("cpu", dtype, enabled=autocast and own == dtype)
            with quickened(family.parts.values(), wanted, device=GPU), mixed:
                loss = predict(family, 0, "zwx").double().square().mean()
            found.append((float(loss.detach()), gradients(loss, trained)))
            assert all(p.dtype == torch.float32 for p in trained.values())
    exact, fused_exact, plain, fast = found
    is_equal_but_for_rounding(exact, fused_exact)
    assert set(asked) == {torch.float32, dtype}
    if dtype == torch.bfloat16:
        assert abs(fast[0] - exact[0]) <= 4e-3 * exact[0]
        assert (fast[1] - exact[1]).norm() <= 1.1 * (plain[1] - exact[1]).norm()


def test_on_a_gpu_peft_computes_what_has_another_dtype(
    tiny_bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32 layers under autocast, and layers that are trained: nothing is cast there that PEFT would not cast."""
    monkeypatch.setattr(fused_lora, "is_on_cpu", lambda x: False)
    layer, x = nn.Linear(4, 4).requires_grad_(False), torch.ones(1, 4)
    assert fused_lora._read_by(layer, x) is x
    assert fused_lora._read_by(layer, x.bfloat16()) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_lora._read_by(layer, x) is None
    assert fused_lora._read_by(layer.requires_grad_(True), x) is None
    family = load_family(str(tiny_bases["sd1"]))
    LoRA(rank=2, targets="conv").attach(family, 0)
    with quickened(family.parts.values(), True, device=GPU):
        kinds = {type(module) for module in family.parts["denoiser"].modules()}
    assert FusedLinear in kinds
    assert not kinds & {products.FrozenLinear, products.FrozenConv2d, fused_lora.FusedConv2d}


def test_without_the_wish_nothing_changes(tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases["sd1"]))
    before = [type(module) for module in family.parts["denoiser"].modules()]
    with quickened(family.parts.values(), False):
        assert [type(module) for module in family.parts["denoiser"].modules()] == before


def test_trained_weights_keep_their_layers(tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases["sd1"]))
    attached("full", ["denoiser"], family)
    before = [type(module) for module in family.parts["denoiser"].modules()]
    with quickened([family.parts["denoiser"]], True):
        assert [type(module) for module in family.parts["denoiser"].modules()] == before


def test_a_small_machine_packs_no_weights(tiny_bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.training.fast.memory_of_machine", lambda: 1000)
    family = load_family(str(tiny_bases["sd1"]))
    LoRA(rank=2).attach(family, 0)
    with quickened(family.parts.values(), True):
        kinds = {type(module).__name__ for module in family.parts["denoiser"].modules()}
    assert "FusedLinear" in kinds
    assert "FrozenConv2d" not in kinds


@pytest.mark.parametrize(("setting", "least", "wanted"), [("on", 10**9, True), ("auto", 1, True), ("off", 1, False)])
def test_a_run_takes_what_its_recipe_says(
    setting: str,
    least: int,
    wanted: bool,
    tiny_bases: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kinds: list[bool] = []
    monkeypatch.setattr("finetune.training.fast.LEAST_PARAMETERS", least)
    monkeypatch.setattr(FusedLinear, "forward", lambda *given, **named: kinds.append(True) or Linear.forward(*given))
    Image.new("RGB", (32, 32), "red").save(tmp_path / "0.png")
    recipe = {
        "base": str(tiny_bases["sd1"]),
        "data": {"photos": str(tmp_path), "class_noun": "mug"},
        "method": {"kind": "lora", "rank": 2},
        "optim": {"kind": "adamw"},
        "run": {"steps": 1, "fast": setting},
        "sample": {"prompts": [], "steps": 1},
        "export": {"formats": ["kohya"], "verify": "off"},
    }
    train(parse_recipe(recipe), tmp_path / "run")
    assert bool(kinds) == wanted
