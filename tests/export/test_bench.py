"""Exports are checked where the run is and in its precision: faults are found there too, one model is in memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import write_photos
from safetensors.torch import load_file, save_file
from test_export import ABOUT, NAMES, bench_of, trained
from test_svd import recipe_of

from finetune.cli.main import run
from finetune.core.devices import DTYPES, exact_device
from finetune.core.records import Check
from finetune.export import verify
from finetune.export.adapter import adapter_from, export_adapter
from finetune.export.base import Adapter, Request, delta
from finetune.export.bench import full_fp32
from finetune.export.registry import EXPORTS, formats_for
from finetune.export.verify import FP64_ROUNDING, apply_adapter, error_in_fp64, moved_check, read_by_diffusers
from finetune.families.settings import Base
from finetune.families.source import load_family
from finetune.jobs import train as job
from finetune.jobs.export import export_run
from finetune.jobs.open import open_result, open_run
from finetune.runs.folder import RunFolder

ALL = [torch.float32, torch.bfloat16, torch.float16]
LOW = ALL[1:]
BLOCK = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1"


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", NAMES)
def test_every_format_is_read_in_low_precision(
    name: str, dtype: torch.dtype, tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    method, family = trained(tiny_bases[name], targets="conv", parts=["denoiser", "text_encoders"], alpha=7)
    adapter, bench = adapter_from(method, family), bench_of(tiny_bases[name], dtype)
    for stored in DTYPES:
        for item in export_adapter(
            adapter, Request(tmp_path / stored, "x", stored, ABOUT), formats_for(("adapter",)), bench
        ):
            assert item.ok, item.checks
            if "diffusers" in item.read_by:
                assert f"{adapter.count} modules, largest" in item.checks[-1].message
                assert f"(in {bench.precision}; it moves a prediction by " in item.checks[-1].message


def transpose(tensors: dict[str, torch.Tensor]) -> None:
    """The delta's transpose; this module is as wide as it is high."""
    up, down = f"{BLOCK}_to_q.lora_up.weight", f"{BLOCK}_to_q.lora_down.weight"
    tensors[up], tensors[down] = tensors[down].T.contiguous(), tensors[up].T.contiguous()


def swap(tensors: dict[str, torch.Tensor]) -> None:
    for end in (".lora_up.weight", ".lora_down.weight"):
        q, k = f"{BLOCK}_to_q{end}", f"{BLOCK}_to_k{end}"
        tensors[q], tensors[k] = tensors[k], tensors[q]


def drop(tensors: dict[str, torch.Tensor]) -> None:
    for end in (".lora_up.weight", ".lora_down.weight", ".alpha"):
        tensors.pop(f"{BLOCK}_to_q{end}")


def raise_alpha(tensors: dict[str, torch.Tensor]) -> None:
    """By 3 %."""
    for key in [key for key in tensors if key.endswith(".alpha")]:
        tensors[key] = tensors[key] * 1.03


FAULTS = {
    "none": lambda tensors: None,
    "missing": drop,
    "alpha": raise_alpha,
    "swapped": swap,
    "transposed": transpose,
}


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("fault", FAULTS)
def test_diffusers_layers_show_planted_faults(
    fault: str, dtype: torch.dtype, tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    """One module of many, and nothing but what diffusers made of the file to tell it by."""
    adapter = adapter_from(*trained(tiny_bases["sd1"], alpha=7))
    bench = bench_of(tiny_bases["sd1"], dtype)
    (item,) = export_adapter(adapter, Request(tmp_path, "x", "fp32", ABOUT), ["kohya"], bench)
    tensors = load_file(item.path)
    FAULTS[fault](tensors)
    save_file(tensors, item.path)
    check = read_by_diffusers(adapter, adapter, item.path, torch.float32, bench)
    assert check.passed == (fault == "none"), check
    if fault in ("missing", "transposed"):
        assert "1 of 48 modules differ, such as denoiser mid_block" in check.message


@pytest.mark.parametrize("name", ["sd3", "flux"])
@pytest.mark.parametrize("dtype", LOW)
def test_a_header_with_another_alpha_is_found(
    name: str, dtype: torch.dtype, tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    adapter = adapter_from(*trained(tiny_bases[name], alpha=7))
    bench, export = bench_of(tiny_bases[name], dtype), EXPORTS["diffusers"]()
    path = export.path(tmp_path, "x", name)
    other = Adapter(name, adapter.base_folder, adapter.layers, adapter.scale * 1.03)
    export.write(other, path, torch.float32, {})
    assert "modules differ" in read_by_diffusers(adapter, adapter, path, torch.float32, bench).message


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux"])
def test_in_fp64_two_readers_agree_to_the_last_digits(
    name: str, tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fp32 leaves in doubt is decided there: a fault of 1e-5 of the adapter's scale is above rounding."""
    adapter = adapter_from(*trained(tiny_bases[name], alpha=7))
    bench, export = bench_of(tiny_bases[name], torch.float32), EXPORTS["diffusers"]()
    path = export.path(tmp_path, "x", name)
    export.write(adapter, path, torch.float32, {})
    off = replace(adapter, scale=adapter.scale * (1 + 1e-5))
    with bench.lent() as family:
        before = {part: deepcopy(family.parts[part].state_dict()) for part in family.parts}
        right, wrong = (error_in_fp64(family, found, path) for found in (adapter, off))
        for part, state in before.items():
            for key, value in family.parts[part].state_dict().items():
                assert value.dtype == state[key].dtype, key
                assert torch.equal(value, state[key]), key
    assert right < FP64_ROUNDING / 10
    assert right < wrong / 10
    monkeypatch.setattr(verify, "same_prediction", lambda error, moved: False)
    check = read_by_diffusers(adapter, adapter, path, torch.float32, bench)
    assert check.passed
    assert "in fp64" in check.message
    assert not read_by_diffusers(
        adapter, replace(adapter, scale=adapter.scale * 1.03), path, torch.float32, bench
    ).passed


def test_an_adapter_fainter_than_fp16_is_not_called_broken(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """fp16 loses digits of what an fp32 file holds: that is the base's precision and no fault of the file."""
    adapter = adapter_from(*trained(tiny_bases["sd1"], alpha=3))
    layers = {part: {m: (a, b * 1e-6) for m, (a, b) in held.items()} for part, held in adapter.layers.items()}
    faint = Adapter("sd1", adapter.base_folder, layers, adapter.scale)
    bench = bench_of(tiny_bases["sd1"], torch.float16)
    (item,) = export_adapter(faint, Request(tmp_path, "x", "fp32", ABOUT), ["kohya"], bench)
    assert item.ok, item.checks
    assert "too small to change a prediction" in item.checks[-1].message
    tensors = load_file(item.path)
    swap(tensors)
    save_file(tensors, item.path)
    assert not read_by_diffusers(faint, faint, item.path, torch.float32, bench).passed


def test_a_prediction_must_be_finite_and_moved(tiny_bases: dict[str, Path]) -> None:
    bench, clean = bench_of(tiny_bases["sd1"], torch.bfloat16), torch.ones(4)
    good = Check("diffusers", True, "x")
    assert moved_check(good, clean, clean * 2, bench, lambda: 1.0).passed
    assert not moved_check(good, clean, clean, bench, lambda: 1.0).passed
    assert moved_check(good, clean, clean, bench, lambda: 1e-5).passed
    odd = moved_check(good, clean, clean * float("nan"), bench, lambda: 1.0)
    assert not odd.passed
    assert "not finite" in odd.message


@pytest.mark.parametrize("dtype", LOW)
def test_a_merge_is_rounded_once(dtype: torch.dtype, tiny_bases: dict[str, Path]) -> None:
    adapter = adapter_from(*trained(tiny_bases["sd1"], alpha=7))
    clean, merged = (load_family(str(tiny_bases["sd1"]), dtype=dtype) for _ in range(2))
    apply_adapter(merged, adapter, 0.1)
    twice = 0
    for part, module, a, b in adapter.modules():
        base = clean.parts[part].get_submodule(module).weight.detach()
        change = delta(a, b, adapter.scale * 0.1).view_as(base)
        found = merged.parts[part].get_submodule(module).weight.detach()
        assert torch.equal(found, (base.float() + change).to(dtype)), module
        twice += int((found != base + change.to(dtype)).sum())
    assert twice > 0


def test_the_probe_is_made_where_the_denoiser_is(tiny_bases: dict[str, Path]) -> None:
    """On the meta device any tensor of the CPU would be an error."""
    for path in tiny_bases.values():
        family = load_family(str(path))
        cond = family.encode_prompts(["a dog"])
        family.parts.to("meta")
        from finetune.export.verify import predicted

        found = predicted(family, {name: value.to("meta") for name, value in cond.items()})
        assert found.device.type == "meta"


def test_float64_is_not_asked_of_apples_gpus() -> None:
    assert exact_device(torch.device("mps")).type == "cpu"
    assert exact_device(torch.device("cuda:1")) == torch.device("cuda:1")


def test_tf32_is_off_in_the_block_and_as_before_behind_it() -> None:
    flags = torch.backends.cudnn
    before = flags.allow_tf32
    with full_fp32():
        assert not flags.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
    assert flags.allow_tf32 == before


# whole runs


def bf16_run(kind: str, base: Path, photos: Path, path: Path) -> Path:
    recipe = recipe_of(base, photos, kind, "run.precision=bf16", "run.steps=2", "sample.count=1", "sample.steps=1")
    return job.train(recipe, path)


@pytest.fixture(scope="module")
def bf16_runs(tiny_bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of a kind, trained when a test first asks for it. Tests export it again, to the same files."""
    folder = tmp_path_factory.mktemp("bf16")
    photos = write_photos(folder / "photos")
    return cache(lambda kind: bf16_run(kind, tiny_bases["sd1"], photos, folder / kind))


@pytest.mark.parametrize("kind", ["lora", "dora", "pivotal"])
@pytest.mark.slow
def test_the_command_writes_what_the_run_wrote(kind: str, bf16_runs: Callable[[str], Path]) -> None:
    """Byte for byte, in a run in bf16; and what is opened again is in bf16."""
    path = bf16_runs(kind)
    files = [file for file in sorted((path / "exports").rglob("*")) if file.is_file()]
    held = {file: file.read_bytes() for file in files}
    notes = (path / "exports.json").read_bytes()
    assert sum(file.suffix == ".safetensors" for file in files) >= 3
    for file in files:
        file.unlink()
    assert run(["export", str(path)]) == (0, "")
    assert {file: file.read_bytes() for file in files} == held
    assert (path / "exports.json").read_bytes() == notes
    family, _ = open_result(path)
    assert {next(part.parameters()).dtype for part in family.parts.values()} == {torch.bfloat16}


def alive() -> int:
    """UNets that hold weights."""
    gc.collect()
    kind = diffusers.UNet2DConditionModel
    return sum(type(item) is kind and any(True for _ in item.parameters()) for item in gc.get_objects())


@pytest.mark.parametrize("kind", ["lora", "dora", "pivotal"])
def test_one_model_is_in_memory_at_a_time(
    kind: str, bf16_runs: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(bf16_runs(kind))
    before = alive()
    family, _ = open_run(folder)
    assert alive() == before + 1
    real, seen = Base.load, []

    def counted(self: Base, dtype: torch.dtype = torch.float32) -> Any:
        seen.append((alive() - before, dtype))
        return real(self, dtype)

    monkeypatch.setattr(Base, "load", counted)
    assert all(item.ok for item in export_run(folder, family))
    assert len(seen) == {"lora": 1}.get(kind, len(seen)), "every format of a LoRA is checked on the same base"
    assert seen
    assert set(seen) == {(0, torch.bfloat16)}
    assert alive() == before
