"""Adapter files of any trainer: what verify says of them, and that convert, resize, merge and extract are exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_export import ABOUT, NAMES, bench_of, probe_trained, trained

from finetune.adapters.algebra import combine, resize
from finetune.adapters.bases import BASE_HASH
from finetune.adapters.inspection import inspect_adapter, open_adapter
from finetune.adapters.operations import extracted, merged_files, merged_model, verify_file, write
from finetune.cli.main import run
from finetune.core.errors import BadInput
from finetune.export.adapter import adapter_from, export_adapter
from finetune.export.base import Adapter, Request, delta
from finetune.export.registry import EXPORTS, formats_for
from finetune.export.verify import apply_adapter
from finetune.families.configs import read_config
from finetune.families.digests import base_hash
from finetune.families.naming.ldm import unet_name
from finetune.families.registry import FAMILIES, weight_shapes
from finetune.families.source import load_family, resolve_base

PARTS = ["denoiser", "text_encoders"]


def written(
    base: Path, folder: Path, formats: list[str] | None = None, dtype: str = "fp32", **settings: object
) -> Adapter:
    """Writes x in the formats and returns the adapter."""
    method, family = trained(base, **{"parts": PARTS, "targets": "conv", "alpha": 7} | settings)
    adapter = adapter_from(method, family)
    export_adapter(
        adapter,
        Request(folder, "x", dtype, ABOUT),
        formats or formats_for(("adapter",)),
        bench_of(adapter.base_folder),
    )
    return adapter


def largest_difference(one: Adapter, other: Adapter) -> float:
    """The largest relative difference of a module's delta between two adapters; infinite where modules differ."""
    first = {(part, module): (a, b) for part, module, a, b in one.modules()}
    second = {(part, module): (a, b) for part, module, a, b in other.modules()}
    if first.keys() != second.keys():
        return float("inf")
    worst = 0.0
    for place, pair in first.items():
        wanted, found = delta(*pair, one.scale), delta(*second[place], other.scale)
        worst = max(worst, float((wanted - found).norm() / wanted.norm().clamp(min=1e-30)))
    return worst


def paths(name: str, title: str = "x") -> dict[str, Path]:
    return {
        kind: export().path(Path(), title, name) for kind, export in EXPORTS.items() if export.artifact == "adapter"
    }


@pytest.mark.parametrize("name", NAMES)
def test_our_own_files_are_found_whole(name: str, tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = written(tiny_bases[name], tmp_path)
    for kind, path in paths(name).items():
        found = verify_file(tmp_path / path, str(tiny_bases[name]))
        assert (found.kind, found.family, found.dtypes) == (kind, name, ("fp32",))
        assert found.problems == []
        assert found.adapter is not None
        assert largest_difference(adapter, found.adapter) < 1e-6
        if kind != "kohya" or not FAMILIES[name].naming.joined:
            assert found.verdicts["diffusers"][0] == ("unknown" if kind == "peft" else "fully")
        assert found.ranks == {3: adapter.count}
        if kind != "kohya" or not FAMILIES[name].naming.joined:  # joined: one alpha over ranks that differ
            folded = kind == "diffusers" and FAMILIES[name].naming.joined
            assert set(found.scales) == {1.0 if folded else round(7 / 3, 6)}
    assert inspect_adapter(tmp_path / paths(name)["peft"], str(tiny_bases[name])).verdicts["ComfyUI"][0] == "refused"


# ComfyUI, Forge, A1111, InvokeAI, sdnext, as their loaders did (docs/exports.md)
READ = {
    ("sd1", "kohya"): "fully fully fully fully fully",
    ("sd2", "kohya"): "fully fully fully fully fully",
    ("sdxl", "kohya"): "fully fully fully fully fully",
    ("sd1", "diffusers"): "partly refused unknown refused unknown",
    ("sdxl", "diffusers"): "partly refused unknown refused unknown",
    ("sdxl-refiner", "kohya"): "unknown unknown unknown unknown unknown",
    ("flux", "kohya"): "fully fully refused fully fully",
    ("flux", "diffusers"): "fully fully refused fully refused",
    ("sd3", "kohya"): "fully fully refused refused refused",
    ("sd3", "diffusers"): "fully refused partly refused refused",
}


@pytest.mark.parametrize("name", sorted({name for name, _ in READ}))
def test_each_ui_gets_the_verdict_of_its_loader(name: str, tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    written(tiny_bases[name], tmp_path, ["kohya", "diffusers"], parts=["denoiser"], targets="attention")
    for kind in [kind for named, kind in READ if named == name]:
        found = inspect_adapter(tmp_path / paths(name)[kind], str(tiny_bases[name]))
        assert " ".join(state for state, _ in found.verdicts.values()) == READ[name, kind], kind


@pytest.mark.parametrize("kind", ["kohya", "diffusers"])
def test_text_encoders_of_flux_cost_a_reader(kind: str, tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """InvokeAI ends the generation at diffusers' keys of the encoder; sdnext drops kohya's whole file."""
    written(tiny_bases["flux"], tmp_path, [kind], targets="attention")
    verdicts = inspect_adapter(tmp_path / paths("flux")[kind], str(tiny_bases["flux"])).verdicts
    assert verdicts["ComfyUI"][0] == verdicts["Forge"][0] == "fully"
    assert verdicts["InvokeAI"][0] == ("refused" if kind == "diffusers" else "fully")
    assert verdicts["sdnext"][0] == "refused"


def test_a1111_loses_one_convolution_of_sdxl_under_diffusers_name(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    lost = "lora_unet_up_blocks_0_upsamplers_0_conv"
    shape = weight_shapes(tiny_bases["sdxl"])["denoiser"]["up_blocks.0.upsamplers.0.conv"]
    pair = {"lora_down.weight": torch.ones(2, *shape[1:]), "lora_up.weight": torch.ones(shape[0], 2, 1, 1)}
    save_file({f"{lost}.{k}": v for k, v in (pair | {"alpha": torch.tensor(2.0)}).items()}, tmp_path / "x.safetensors")
    verdicts = inspect_adapter(tmp_path / "x.safetensors", str(tiny_bases["sdxl"])).verdicts
    assert verdicts["A1111"][0] == "partly"
    assert {verdicts[ui][0] for ui in ("ComfyUI", "Forge", "InvokeAI", "sdnext")} == {"fully"}


@pytest.mark.parametrize("name", NAMES)
def test_the_form_for_uis_is_read_as_our_tables_say(name: str, tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """SD1, SD2 and SDXL fully by all; the joined form by some."""
    written(tiny_bases[name], tmp_path, parts=["denoiser"])
    found = inspect_adapter(tmp_path / "x.safetensors", str(tiny_bases[name]))
    assert found.kind == "kohya"
    readers = FAMILIES[name].naming.known_readers.kohya
    uis = {ui for ui, (state, _) in found.verdicts.items() if state == "fully"}
    assert uis == {ui for ui in found.verdicts if ui.split("/")[0] in readers}
    if not FAMILIES[name].naming.joined:
        verdict, _ = verify_file(tmp_path / "x.safetensors", str(tiny_bases[name])).verdicts["diffusers"]
        assert verdict == "fully"


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_both_styles_of_unet_names_are_read(name: str, tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """Other trainers write the style that we do not: diffusers' names for SDXL, the original ones for SD1 and SD2."""
    adapter = written(tiny_bases[name], tmp_path, ["kohya"], parts=["denoiser"])
    config = read_config(tiny_bases[name], "unet/config.json")
    names = {
        f"lora_unet_{module.replace('.', '_')}": f"lora_unet_{unet_name(module, config).replace('.', '_')}"
        for module in adapter.layers["denoiser"]
    }
    if name == "sdxl":
        names = {original: ours for ours, original in names.items()}
    tensors = {
        names[key.split(".", 1)[0]] + "." + key.split(".", 1)[1]: value
        for key, value in load_file(tmp_path / "x.safetensors").items()
    }
    assert any("down_blocks" in key for key in tensors) == (name == "sdxl")
    save_file(tensors, tmp_path / "other.safetensors")
    found = inspect_adapter(tmp_path / "other.safetensors", str(tiny_bases[name]))
    assert found.problems == []
    assert found.adapter is not None
    assert largest_difference(adapter, found.adapter) < 1e-6


def first(tensors: dict[str, torch.Tensor], ending: str) -> str:
    return next(key for key in tensors if key.endswith(ending))


def rename(tensors: dict[str, torch.Tensor], old: str, new: str) -> None:
    for key in list(tensors):
        tensors[key.replace(old, new)] = tensors.pop(key)


def drop(tensors: dict[str, torch.Tensor], word: str) -> None:
    for key in [key for key in tensors if word in key]:
        del tensors[key]


def transpose_conv(tensors: dict[str, torch.Tensor]) -> None:
    key = next(key for key in tensors if key.endswith("conv1.lora_down.weight"))
    tensors[key] = tensors[key].transpose(0, 1).contiguous()


FAULTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "missing alpha": (lambda t: t.pop(first(t, ".alpha")), "without alpha"),
    "missing up": (lambda t: t.pop(first(t, ".lora_up.weight")), "without their up matrix"),
    "wrong prefix": (lambda t: rename(t, "lora_unet_", "lora_net_"), "fit nothing in sd1"),
    "extra key": (lambda t: t.__setitem__("optimizer.step", torch.ones(1)), "optimizer.step"),
    "nan": (lambda t: t[first(t, ".lora_up.weight")].fill_(float("nan")), "NaN or infinite values"),
    "all zero": (lambda t: [v.zero_() for k, v in t.items() if k.endswith("up.weight")], "changes nothing"),
    "transposed conv": (transpose_conv, "another shape"),
    "another trainer's keys too": (lambda t: t.__setitem__("unet.x.lora_A.weight", torch.ones(2, 2)), "unet.x"),
    "dora": (lambda t: t.__setitem__(first(t, ".alpha").replace(".alpha", ".dora_scale"), torch.ones(3)), "DoRA"),
    "loha": (lambda t: t.__setitem__("lora_unet_x.hada_w1_a", torch.ones(3)), "LoHa"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_verify_names_each_fault(
    fault: str, tiny_bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, words = FAULTS[fault]
    written(tiny_bases["sd1"], tmp_path, ["kohya"])
    tensors = load_file(tmp_path / "x.safetensors")
    spoil(tensors)
    save_file(tensors, tmp_path / "bad.safetensors")
    code, message = run(["verify", str(tmp_path / "bad.safetensors"), "--base", str(tiny_bases["sd1"])])
    assert code == 1
    assert "bad.safetensors" in message
    problems = [line for line in capsys.readouterr().out.splitlines() if "PROBLEM" in line]
    assert any(words in line for line in problems), problems


def test_problems_name_their_kind_and_every_module(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """Without alpha a file can still be taken over; with a value that is not finite it can't."""
    base = str(tiny_bases["sd1"])
    written(tiny_bases["sd1"], tmp_path, ["kohya"])
    tensors = load_file(tmp_path / "x.safetensors")
    alphas = sorted(key for key in tensors if key.endswith(".alpha"))[:2]
    for key in alphas:
        del tensors[key]
    save_file(tensors, tmp_path / "faint.safetensors")
    _, found = open_adapter(tmp_path / "faint.safetensors", base)
    (problem,) = found.problems
    assert (problem.name, problem.modules) == ("no-alpha", tuple(key.removesuffix(".alpha") for key in alphas))
    bad = first(tensors, ".lora_up.weight")
    tensors[bad].fill_(float("nan"))
    save_file(tensors, tmp_path / "bad.safetensors")
    found = inspect_adapter(tmp_path / "bad.safetensors", base)
    assert bad.removesuffix(".lora_up.weight") in {item.name: item.modules for item in found.problems}["not-finite"]
    with pytest.raises(BadInput, match="NaN or infinite values"):
        open_adapter(tmp_path / "bad.safetensors", base)


def test_a_dropped_encoder_and_a_lost_prefix_are_told_by_reader(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """diffusers' own converter writes lora_te1_ for SD1: two readers lose the encoder in silence."""
    written(tiny_bases["sd1"], tmp_path, ["kohya"])
    tensors = load_file(tmp_path / "x.safetensors")
    rename(tensors, "lora_te_", "lora_te1_")
    save_file(tensors, tmp_path / "te1.safetensors")
    found = inspect_adapter(tmp_path / "te1.safetensors", str(tiny_bases["sd1"]))
    assert found.problems == []
    assert {ui: state for ui, (state, _) in found.verdicts.items()} == {
        "ComfyUI": "fully", "Forge": "fully", "A1111": "fully", "InvokeAI": "partly", "sdnext": "partly",
    }  # fmt: skip
    drop(tensors, "lora_te1_")
    save_file(tensors, tmp_path / "none.safetensors")
    assert set(inspect_adapter(tmp_path / "none.safetensors", str(tiny_bases["sd1"])).adapter.layers) == {"denoiser"}


def test_unmatched_keys_by_reader(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    written(tiny_bases["sdxl"], tmp_path, ["kohya"])
    tensors = load_file(tmp_path / "x.safetensors")
    for number in range(13):
        tensors[f"stranger.{number}"] = torch.ones(1)
        save_file(tensors, tmp_path / "odd.safetensors")
        if number == 11:
            few = inspect_adapter(tmp_path / "odd.safetensors", str(tiny_bases["sdxl"])).verdicts
    many = verify_file(tmp_path / "odd.safetensors", str(tiny_bases["sdxl"])).verdicts
    assert (few["Forge"][0], many["Forge"][0]) == ("partly", "refused")
    assert (few["ComfyUI"][0], few["InvokeAI"][0]) == ("partly", "refused")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
def test_conversions_there_and_back_are_exact(
    name: str, dtype: str, tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    """Every format to every format: the same deltas to fp32's last digits, in fp16 too (nothing is rounded twice)."""
    base = str(tiny_bases[name])
    written(tiny_bases[name], tmp_path, dtype=dtype, alpha=None)
    for start, path in paths(name).items():
        source, found = open_adapter(tmp_path / path, base)
        assert found.dtypes == (dtype,)
        for end in formats_for(("adapter",)):
            (item,) = write(source, tmp_path / f"{start}-to", [end], dtype, False, {})
            assert item.ok, item.checks
            assert item.largest_error <= 1e-6
            again, _ = open_adapter(item.path, base)
            assert largest_difference(source, again) <= 1e-6, (start, end)


def test_modules_of_several_ranks_and_alphas(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """As LoRAs with per-layer ranks have them; what leaves has one alpha, and the same deltas."""
    written(tiny_bases["sd1"], tmp_path, ["kohya"])
    tensors = load_file(tmp_path / "x.safetensors")
    for number, key in enumerate([key for key in tensors if key.endswith(".alpha")]):
        name = key.removesuffix(".alpha")
        rank = 1 + number % 3
        tensors[f"{name}.lora_down.weight"] = tensors[f"{name}.lora_down.weight"][:rank].clone()
        tensors[f"{name}.lora_up.weight"] = tensors[f"{name}.lora_up.weight"][:, :rank].clone()
        tensors[key] = torch.tensor(1.0 + number % 5)
    save_file(tensors, tmp_path / "mixed.safetensors")
    base = str(tiny_bases["sd1"])
    source, found = open_adapter(tmp_path / "mixed.safetensors", base)
    assert set(found.ranks) == {1, 2, 3}
    for item in write(source, tmp_path / "one", formats_for(("adapter",)), "fp32", False, {}):
        assert item.ok, item.checks
        assert largest_difference(source, open_adapter(item.path, base)[0]) <= 1e-6
    alphas = {float(v) for k, v in load_file(tmp_path / "one.safetensors").items() if k.endswith(".alpha")}
    assert len(alphas) == 1


def test_resize_is_the_best_approximation_of_its_rank(tiny_bases: dict[str, Path]) -> None:
    """Against torch's SVD of the whole delta (Eckart-Young)."""
    adapter = adapter_from(*trained(tiny_bases["sd1"], targets="conv", alpha=7))
    small, kept = resize(adapter, rank=2)
    lost = whole = 0.0
    for (_, _, a, b), (_, _, c, d) in zip(adapter.modules(), small.modules(), strict=True):
        wanted = delta(a, b, adapter.scale).flatten(1).double()
        values = torch.linalg.svdvals(wanted)
        error = float((delta(c, d, small.scale).flatten(1) - wanted).norm())
        assert error == pytest.approx(float(values[2:].norm()), rel=1e-4, abs=1e-6)
        lost, whole = lost + error**2, whole + float(wanted.norm()) ** 2
    assert small.rank == 2
    assert kept.error == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    assert kept.energy == pytest.approx(1 - lost / whole, rel=1e-6)
    assert largest_difference(adapter, resize(adapter, rank=3)[0]) < 1e-5


def test_resize_by_energy_keeps_that_much_in_every_module(tiny_bases: dict[str, Path]) -> None:
    adapter = adapter_from(*trained(tiny_bases["sd1"], targets="conv"))
    small, kept = resize(adapter, energy=0.8)
    assert kept.energy >= 0.8
    assert kept.worst <= 0.2**0.5 + 1e-6
    assert {len(a) for _, _, a, _ in small.modules()} <= {1, 2, 3}
    assert resize(adapter, energy=1.0)[0].rank == 3


def test_a_sum_of_adapters_is_the_sum_of_their_deltas(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    one = written(tiny_bases["sd1"], tmp_path, ["kohya"], targets="attention")
    other = adapter_from(*trained(tiny_bases["sd1"], targets="conv", alpha=2))
    both = combine([(one, 0.5), (other, -2.0)])
    for part, module, a, b in both.modules():
        wanted = 0
        for adapter, weight in ((one, 0.5), (other, -2.0)):
            pair = adapter.layers.get(part, {}).get(module)
            if pair is not None:
                wanted = wanted + weight * delta(*pair, adapter.scale)
        assert torch.allclose(delta(a, b, both.scale), wanted, atol=1e-5)
    path = tmp_path / "x.safetensors"
    doubled, _ = merged_files([(path, 1.5), (path, 0.5)], str(tiny_bases["sd1"]), None)
    again, kept = merged_files([(path, 1.5), (path, 0.5)], str(tiny_bases["sd1"]), 3)
    assert doubled.rank == 6
    assert kept is not None
    assert kept.error < 1e-6
    assert largest_difference(doubled, again) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_a_merged_model_draws_what_base_and_adapter_draw(
    name: str, tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    """LoRA + base -> folder; and the difference of the two taken out again is that LoRA."""
    adapter = written(tiny_bases[name], tmp_path, ["kohya"])
    item = merged_model([(tmp_path / paths(name)["kohya"], 0.5)], str(tiny_bases[name]), tmp_path / "model", "fp32")
    assert item.ok, item.checks
    clean = load_family(str(tiny_bases[name]))
    apply_adapter(clean, adapter, 0.5)
    assert torch.allclose(probe_trained(load_family(str(tmp_path / "model"))), probe_trained(clean), atol=2e-5)
    out, kept = extracted(str(tmp_path / "model"), str(tiny_bases[name]), 3)
    assert kept.error < 1e-4
    half = combine([(adapter, 0.5)])
    for part, module, a, b in half.modules():
        found = delta(*out.layers[part][module], out.scale)
        assert torch.allclose(found, delta(a, b, half.scale), atol=1e-5), module


def test_extraction_says_what_a_rank_costs(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    from finetune.export.model.model_folder import export_folder
    from finetune.methods.full import Full

    family = load_family(str(tiny_bases["sd1"]))
    made = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in Full(parts=PARTS).attach(family, 0).values():
            value.add_(torch.randn(value.shape, generator=made) * 0.01)
    export_folder(family, tmp_path / "model", "fp32")
    base = str(tiny_bases["sd1"])
    low, high = (extracted(str(tmp_path / "model"), base, rank)[1] for rank in (2, 16))
    assert 1 > low.error > high.error > 0
    assert low.energy == pytest.approx(1 - low.error**2)


def test_extraction_names_what_a_lora_cant_hold(
    tiny_bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of the squared change is in a norm: the error of the matrices alone says nothing of it."""
    from finetune.export.model.model_folder import export_folder

    family = load_family(str(tiny_bases["sd1"]))
    linear = family.parts["denoiser"].get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    norm = family.parts["denoiser"].get_submodule("mid_block.attentions.0.transformer_blocks.0.norm1")
    with torch.no_grad():
        norm.weight += 0.1
        linear.weight[0, 0] += 0.1 * len(norm.weight) ** 0.5
    export_folder(family, tmp_path / "model", "fp32")
    arguments = ["--base", str(tiny_bases["sd1"]), "--out", str(tmp_path / "back")]
    assert run(["extract", str(tmp_path / "model"), "--rank", "3", *arguments])[0] == 0
    assert "not in the file: 1 biases, norms and embeddings changed too (50.0%" in capsys.readouterr().out


def test_the_commands(tiny_bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--base", str(tiny_bases["sd1"])]
    written(tiny_bases["sd1"], tmp_path, ["kohya"])
    file, out = str(tmp_path / "x.safetensors"), str(tmp_path / "y")
    assert run(["verify", file, *base]) == (0, "")
    said = capsys.readouterr().out
    for words in ("kohya LoRA for sd1", "denoiser: ", "rank 3; scale (alpha / rank) 2.33", "ComfyUI      fully"):
        assert words in said
    assert run(["convert", file, "--to", "diffusers", "--to", "peft", "--out", out, *base]) == (0, "")
    assert "read by diffusers" in capsys.readouterr().out
    assert (tmp_path / "y-peft" / "denoiser" / "adapter_config.json").is_file()
    assert run(["resize", file, "--rank", "2", "--out", out, *base]) == (0, "")
    assert "of the energy" in capsys.readouterr().out
    code, message = run(["resize", file, "--rank", "2", "--out", out, *base])
    assert code == 2
    assert "--force" in message
    assert run(["resize", file, "--energy", "0.9", "--out", out, "--force", *base])[0] == 0
    assert run(["merge", f"{file}:0.5", file, "--out", str(tmp_path / "sum"), *base])[0] == 0
    model = tmp_path / "model"
    assert run(["merge", f"{file}:0.5", "--to", "folder", "--out", str(model), *base])[0] == 0
    assert run(["extract", str(model), "--rank", "3", "--out", str(tmp_path / "back"), *base])[0] == 0


def test_a_converted_file_still_names_its_base(tmp_path: Path) -> None:
    """It can be converted again without --base, also over itself: the first output compared with SD 1.5."""
    tiny = resolve_base("tiny")
    file, out = tmp_path / "x.safetensors", str(tmp_path / "y")
    written(tiny, tmp_path, ["kohya"])
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() | {BASE_HASH: base_hash(tiny)}
    save_file(load_file(file), file, metadata)
    for given in (file, f"{out}.safetensors"):
        assert run(["convert", str(given), "--to", "kohya", "--out", out, "--force"]) == (0, "")
    with safe_open(f"{out}.safetensors", "pt") as opened:
        assert opened.metadata()[BASE_HASH] == base_hash(tiny)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["resize", "{x}", "--out", "y"], "either --rank or --energy"),
        (["resize", "{x}", "--out", "y", "--rank", "2", "--dtype", "int8"], "int8"),
        (["convert", "{x}", "--out", "y", "--to", "kohja"], "did you mean 'kohya'"),
        (["merge", "{x}:much", "--out", "y"], "'much'"),
        (["verify", "/nowhere.safetensors"], "/nowhere.safetensors"),
        (["verify", "{base}/vae/diffusion_pytorch_model.safetensors"], "is not a LoRA"),
        (["verify", "{base}"], "not a PEFT folder"),
        (["extract", "{base}", "--out", "y"], "nothing to extract"),
        (["extract", "{sdxl}", "--out", "y"], "is of family sdxl but the base is of family sd1"),
    ],
)
def test_bad_input(arguments: list[str], words: str, tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    written(tiny_bases["sd1"], tmp_path, ["kohya"])
    names = {"x": tmp_path / "x.safetensors", "base": tiny_bases["sd1"], "sdxl": tiny_bases["sdxl"]}
    filled = [text.format(**names) if "{" in text else text for text in arguments]
    code, message = run([*filled, "--base", str(tiny_bases["sd1"])])
    assert code == 2
    assert words in message
    assert "\n" not in message


def test_a_file_with_strangers_is_not_converted(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    written(tiny_bases["sd1"], tmp_path, ["kohya"])
    save_file(load_file(tmp_path / "x.safetensors") | {"odd": torch.ones(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(BadInput, match="finetune verify"):
        open_adapter(tmp_path / "odd.safetensors", str(tiny_bases["sd1"]))
