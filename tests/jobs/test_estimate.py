"""Counts on the meta device against loaded models, a real step's saved tensors, and the published sizes."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional

from finetune.cli.main import run
from finetune.config.load import parse_recipe
from finetune.config.recipe import Recipe
from finetune.core.batch import Geometry
from finetune.core.devices import gib
from finetune.families.registry import FAMILIES, family_of
from finetune.families.source import load_family
from finetune.jobs.estimate import Estimate, _activations, _counting, estimate, report
from finetune.methods.layers.products import has_packed_convolutions
from finetune.methods.registry import METHODS
from finetune.testing.published import PUBLISHED
from finetune.testing.published import write as write_published
from finetune.testing.tables import HEAD, between_marks, sizes_row

# the published counts, in millions (../shared/reference/methods.md, the model cards)
DENOISERS = {name: millions for name, (_, _, _, millions) in PUBLISHED.items()}
OTHERS = {"SD 1.5": {"vae": 84, "text_encoder": 123}, "SDXL": {"vae": 84, "text_encoder_2": 695},
          "SD3 medium": {"vae": 84, "text_encoder_3": 4762}, "Flux.1 dev": {"text_encoder_2": 4762}}  # fmt: skip


def recipe(base: Path, **sections: dict) -> Recipe:
    plain = {"base": str(base), "data": {"photos": "photos", "class_noun": "dog"}, "optim": {"kind": "adamw"}}
    return parse_recipe({**plain, "method": {"kind": "lora"}, **sections})


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a published model's configs."""
    return cache(lambda name: write_published(name, tmp_path_factory.mktemp("published")))


@pytest.fixture(scope="module")
def counted_as(published: Callable[[str], Path]) -> Callable[..., Estimate]:
    """The estimate of a LoRA, or of `sections`, for a published model; a model is counted in seconds, so once."""
    known: dict[str, Estimate] = {}

    def count(name: str, **sections: dict) -> Estimate:
        key = f"{name} {sections}"
        known[key] = known.get(key) or estimate(recipe(published(name), **sections))
        return known[key]

    return count


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_models_are_counted_without_weights(name: str, counted_as: Callable[..., Estimate]) -> None:
    counted = counted_as(name)
    assert round(counted.parameters["denoiser"] / 1e6) == DENOISERS[name]
    for part, millions in OTHERS.get(name, {}).items():
        assert round(counted.parameters[part] / 1e6) == millions
    assert 0 < counted.trained_parameters < 0.02 * counted.parameters["denoiser"]


def test_sd15s_lora_has_the_known_size(published: Callable[[str], Path]) -> None:
    """Rank 4 on the attention projections is diffusers' example: 797,184 parameters, a file of 3.2 MB in fp32."""
    method = {"kind": "lora", "rank": 4, "targets": "attention"}
    folder = published("SD 1.5")
    counted = estimate(recipe(folder, method=method))
    assert counted.trained_parameters == 797_184
    assert report(recipe(folder, method=method, export={"dtype": "fp32"}))["export"] == "3.2 MB in fp32"


@pytest.mark.skipif(not has_packed_convolutions(), reason="no AVX-512: there are no faster kernels")
def test_what_faster_kernels_take_on_a_cpu_stands_beside_the_memory(
    published: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the parts in the loop alone: the VAE's convolutions are not in it, and full training has no frozen ones."""
    monkeypatch.setattr("finetune.training.fast.memory_of_machine", lambda: 2**40)
    monkeypatch.setattr("finetune.jobs.estimate.best_device", lambda: torch.device("cpu"))
    folder = published("SD 1.5")
    own = estimate(recipe(folder))
    family = family_of(folder).on_meta(folder, torch.float32, ())
    convolutions = [m for m in family.parts["denoiser"].modules() if isinstance(m, nn.Conv2d)]
    assert own.kernels == 2 * sum(m.weight.nbytes for m in convolutions)
    assert own.total == own.held + own.trained + own.activations
    assert report(recipe(folder))["on a CPU"] == f"up to {gib(own.kernels)} more, for faster steps (run.fast)"
    assert "on a CPU" not in report(recipe(folder, run={"fast": "off"}))
    assert estimate(recipe(folder, method={"kind": "full"})).kernels == 0


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_counts_are_those_of_the_loaded_family(name: str, kind: str, tiny_bases: dict[str, Path]) -> None:
    method = {"kind": kind, "parts": ["denoiser", "text_encoders"]}
    asked = recipe(tiny_bases[name], method=method)
    counted, family = estimate(asked), load_family(str(tiny_bases[name]))
    assert counted.parameters == {
        part: sum(p.numel() for p in module.parameters()) for part, module in family.parts.items()
    }
    trained = METHODS[kind](parts=method["parts"]).attach(family, 0)
    assert counted.trained_parameters == sum(p.numel() for p in trained.values())


@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_those_of_a_real_step(name: str, checkpointing: bool, tiny_bases: dict[str, Path]) -> None:
    """The same accounting over real tensors and torch's own attention: within 10 %."""
    asked = recipe(tiny_bases[name])
    family = load_family(str(tiny_bases[name]))
    asked.method.attach(family, 0)
    family.parts["denoiser"].train()
    if checkpointing:
        family.enable_gradient_checkpointing(["denoiser"])
    side = family.resolution
    noisy = torch.randn(2, family.codec.channels, side // 2, side // 2)
    with _counting([p for part in family.parts.values() for p in part.parameters()], fused=False) as seen:
        cond = family.encode_prompts(["", ""])
        square = [Geometry((side, side), (0, 0), (side, side))] * 2
        family.predict(noisy, torch.tensor([3, 500]), cond, square).float().square().mean()
    meta = FAMILIES[name].on_meta(tiny_bases[name], torch.float32)
    meta.t5_length = 16  # the tiny tokenizer's; a real one reads as far as the family does
    asked.method.attach(meta, 0)
    if checkpointing:
        meta.enable_gradient_checkpointing(["denoiser"])
    counted = _activations(meta, ["denoiser"], 2, side)
    assert counted == pytest.approx(sum(seen.values()), rel=0.1)


# LoRA on all linear layers (and 1x1 convolutions) of the attention blocks
MODULES = {"SD 1.5": 192, "SD 2.1": 192, "SDXL": 722, "SDXL refiner": 462, "SD3 medium": 284, "SD3.5 medium": 336,
           "SD3.5 large": 452, "Flux.1 dev": 418}  # fmt: skip
QUICK = ("SD 1.5", "SD3 medium")


@pytest.mark.parametrize("kind", list(METHODS))
@pytest.mark.parametrize("name", list(FAMILIES))
def test_modules_are_those_that_are_adapted(name: str, kind: str, tiny_bases: dict[str, Path]) -> None:
    """Against PEFT's layers, or the owners of trained parameters, on the loaded family."""
    words = {"vectors": 3} if kind in ("textual_inversion", "pivotal") else {}
    parts = ["text_encoders"] if kind == "textual_inversion" else ["denoiser", "text_encoders"]
    method = {"kind": kind, "parts": parts, **words}
    counted = estimate(recipe(tiny_bases[name], method=method))
    family, real = load_family(str(tiny_bases[name])), METHODS[kind](parts=parts, **words)
    real.add_subject_token(family, "zwx", "mug")
    trained = real.attach(family, 0)
    modules = [module for part in family.parts.values() for module in part.modules()]
    layers = sum(isinstance(module, BaseTunerLayer) for module in modules)
    own = {id(p) for p in trained.values()}
    owners = sum(any(id(p) in own for p in module._parameters.values()) for module in modules)
    assert counted.modules == {"full": owners, "textual_inversion": 0}.get(kind, layers)
    assert (counted.modules > 0) == (kind != "textual_inversion")
    assert counted.vectors == (3 * len(family.word_tokenizers) if words else 0)
    assert counted.trained_parameters == sum(p.numel() for p in trained.values())
    clean = load_family(str(tiny_bases[name])).parts.values()
    assert counted.clean == 4 * sum(p.numel() for part in clean for p in part.parameters())


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_modules_of_published_models(
    name: str, published: Callable[[str], Path], counted_as: Callable[..., Estimate]
) -> None:
    """Against the layers by name and class; SD3's last block has one whose output nothing reads."""
    folder = published(name)
    denoiser = family_of(folder).on_meta(folder, torch.float32).parts["denoiser"]
    layers = {path: layer for path, layer in denoiser.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    blocks = [
        path for path in layers if "attentions." in path or ("transformer_blocks." in path and ".norm" not in path)
    ]
    dead = [path for path in blocks if name.startswith("SD3") and path.endswith("add_q_proj")][-1:]
    assert len(blocks) - len(dead) == MODULES[name]
    assert counted_as(name).modules == MODULES[name]


def test_what_the_page_says_is_what_the_command_gives() -> None:
    rows = between_marks((Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")).splitlines()
    assert rows[:2] == HEAD.splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == [f"| {name}" for name in PUBLISHED]


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED]
)
@pytest.mark.slow
def test_a_row_of_the_page_is_what_the_command_gives(name: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    assert sizes_row(name) in between_marks(page).splitlines()


def test_attention_is_replaced_in_the_block_and_nowhere_else() -> None:
    before = functional.scaled_dot_product_attention
    query = torch.randn(1, 2, 8, 4, requires_grad=True)
    wanted = before(query, query, query)
    with ThreadPoolExecutor(1) as other, _counting([]) as seen:
        assert functional.scaled_dot_product_attention is before
        assert torch.equal(other.submit(functional.scaled_dot_product_attention, *[query] * 3).result(), wanted)
        assert not seen
        functional.scaled_dot_product_attention(query, query, query)
    assert sum(seen.values()) == 2 * query.nbytes  # q, k and v are one tensor; the output
    assert torch.equal(functional.scaled_dot_product_attention(query, query, query), wanted)


@pytest.mark.parametrize(
    ("setting", "method", "formats", "words"),
    [
        ("full", "lora", [], "an unchanged base of 3.97 GiB, with no other model in memory"),
        ("full", "full", [], "one part at a time (1.60 GiB at most) in main memory, in addition to the trained model"),
        ("full", "full", ["checkpoint"], "a file of 1.99 GiB in main memory, in addition to the trained model"),
        ("full", "textual_inversion", [], "an unchanged base of 3.97 GiB, with no other model in memory"),
        ("deltas", "lora", [], "files are read back; no second model is loaded"),
        ("off", "full", [], "not checked (export.verify is off)"),
    ],
)
def test_the_plan_tells_what_checks_need(
    setting: str, method: str, formats: list[str], words: str, tmp_path: Path
) -> None:
    """SD 1.5's parts are 859,520,964 + 83,653,863 + 123,060,480 weights."""
    weights = 859_520_964 + 83_653_863 + 123_060_480
    assert (f"{weights * 4 / 2**30:.2f}", f"{weights * 2 / 2**30:.2f}") == ("3.97", "1.99")
    export = {"verify": setting, "formats": formats}
    asked = recipe(write_published("SD 1.5", tmp_path), method={"kind": method}, export=export)
    assert report(asked)["checks"] == words


def test_checkpointing_and_8_bits_need_less(counted_as: Callable[..., Estimate]) -> None:
    full = {"kind": "full"}
    plain = counted_as("SD 1.5", method=full)
    light = counted_as("SD 1.5", method=full, run={"gradient_checkpointing": True})
    small = counted_as("SD 1.5", method=full, optim={"kind": "adamw8bit"})
    assert light.activations < 0.5 * plain.activations
    assert light.trained == plain.trained
    assert small.trained < 0.7 * plain.trained
    twice = counted_as("SD 1.5", method=full, run={"batch_size": 2})
    assert twice.activations == pytest.approx(2 * plain.activations, rel=0.05)


def test_a_prior_is_counted(counted_as: Callable[..., Estimate]) -> None:
    full = {"kind": "full"}
    plain, teacher = (counted_as("SD 1.5", method=full, prior={"kind": kind}) for kind in ("none", "frozen_base"))
    assert teacher.activations == pytest.approx(2 * plain.activations, rel=0.05)
    assert teacher.held - plain.held == pytest.approx(4 * plain.trained_parameters)  # the frozen twin, fp32
    free = counted_as("SD 1.5", prior={"kind": "frozen_base"})
    assert free.held == counted_as("SD 1.5").held  # an adapter is switched off instead


def test_the_command(tiny_bases: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "demo", f"base={tiny_bases['sd3']}", "method.targets=all-linear"]) == (0, "")
    said = capsys.readouterr().out
    for words in ("sd3", "run.precision=bf16", "trained", "memory", "checkpoint", "text_encoder_3"):
        assert words in said
    code, message = run(["plan", "demo", "base=/nowhere"])
    assert code == 2
    assert "/nowhere" in message


def test_a_sharded_run_is_counted_for_each_process(tiny_bases: dict[str, Path]) -> None:
    """Flux, full: 16 bytes of each weight, shared out; in one piece are what is in no block, two blocks' weights and
    one block's gradients. A LoRA's frozen weights are shared out too."""
    run = {"shard": True, "batch_size": 8, "accumulate": 2, "precision": "fp32", "ema": 0.9}
    asked = recipe(tiny_bases["flux"], method={"kind": "full"}, run=run)
    own, denoiser = estimate(asked), load_family(str(tiny_bases["flux"])).parts["denoiser"]
    counts: dict[str, int] = {}
    for name, weight in denoiser.named_parameters():
        block = re.match(r"(single_)?transformer_blocks\.\d+\.", name)
        counts[block[0] if block else ""] = counts.get(block[0] if block else "", 0) + weight.numel()
    rest, blocks = counts.pop(""), sorted(counts.values())
    in_one_piece = 4 * (rest + blocks[-1] + blocks[-2] + max(rest, blocks[-1]))
    for processes in (2, 4):
        wanted = own.trained_parameters * (4 + 4 + 8 + 4) / processes + in_one_piece + own.activations / processes
        assert own.of_each(processes) == pytest.approx(wanted + own.held)
    assert own.held == 0
    row = report(asked)["sharded"]
    assert "on each of 2 processes" in row
    assert "on each of 4 processes" in row
    assert "on each of 3 processes" not in row
    lora = estimate(recipe(tiny_bases["flux"], run=run))
    assert lora.cut > 0.9 * lora.held
    each = estimate(recipe(tiny_bases["flux"], run=run | {"processes": 4}))
    assert each.activations == pytest.approx(lora.activations / 4, rel=0.05)
    assert each.of_each(4) == pytest.approx(lora.of_each(4), rel=0.02)
    assert "nobody to share with" in report(recipe(tiny_bases["flux"], run={"shard": True}))["sharded"]
