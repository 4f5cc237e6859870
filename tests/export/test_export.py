"""Exports: what is written is what was trained, read again by us, by diffusers and by PEFT; faults are found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune.adapters.inspection import accepted_names, open_adapter
from finetune.core.errors import BadInput
from finetune.export.adapter import adapter_from, export_adapter
from finetune.export.base import Adapter, Request, delta
from finetune.export.bench import Bench
from finetune.export.lora.kohya import Place, join, key_of, key_table, split
from finetune.export.model.model_folder import export_folder
from finetune.export.registry import EXPORTS, formats_for
from finetune.export.verify import apply_adapter, probe, verify
from finetune.families.base import Family
from finetune.families.registry import FAMILIES, family_of, weight_shapes
from finetune.families.source import load_family
from finetune.methods.full import Full
from finetune.methods.lora import LoRA
from finetune.testing.published import PUBLISHED
from finetune.testing.published import write as write_published

ABOUT = {"title": "x", "trigger_phrase": "zwx mug", "resolution": "32x32", "base_hash": "h"}
NAMES = list(FAMILIES)


def bench_of(base: Path, dtype: torch.dtype = torch.float32) -> Bench:
    """The CPU in a precision."""
    return Bench(torch.device("cpu"), dtype, lambda precision: load_family(str(base), dtype=precision))


def trained(base: Path, **settings: object) -> tuple[LoRA, Family]:
    """A LoRA whose B is not zero, so that its delta is something."""
    family = load_family(str(base))
    if family.naming.joined and settings.get("targets") == "conv":
        settings["targets"] = "all-linear"
    method = LoRA(rank=3, **settings)
    parameters = method.attach(family, 0)
    made = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in parameters.items():
            if ".lora_B." in name:
                value.copy_(torch.randn(value.shape, generator=made) * 0.1)
    return method, family


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("targets", ["attention", "conv"])
@pytest.mark.parametrize("parts", [["denoiser"], ["text_encoders"], ["denoiser", "text_encoders"]])
def test_every_format_holds_what_was_trained(
    name: str, targets: str, parts: list, tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    method, family = trained(tiny_bases[name], targets=targets, parts=parts, alpha=7)
    wanted = probe_trained(family)
    adapter = adapter_from(method, family)
    for item in export_adapter(
        adapter, Request(tmp_path, "x", "fp32", ABOUT), formats_for(("adapter",)), bench_of(adapter.base_folder)
    ):
        assert item.ok, item.checks
        assert item.largest_error <= 1e-6
        assert item.modules == adapter.count
        clean = load_family(str(tiny_bases[name]))
        assert not torch.allclose(probe_trained(clean), wanted, atol=1e-3)
        apply_adapter(clean, open_adapter(item.path, str(tiny_bases[name]))[0])
        assert torch.allclose(probe_trained(clean), wanted, atol=2e-5)


@torch.no_grad()
def probe_trained(family: Family) -> torch.Tensor:
    return probe(family)


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_alpha_and_rounding(stabilised: bool, dtype: str, tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    method, family = trained(tiny_bases["sd1"], alpha=2, rank_stabilised=stabilised)
    adapter = adapter_from(method, family)
    assert adapter.scale == pytest.approx(2 / (3**0.5 if stabilised else 3))
    assert all(
        item.ok
        for item in export_adapter(
            adapter, Request(tmp_path, "x", dtype, ABOUT), formats_for(("adapter",)), bench_of(adapter.base_folder)
        )
    )


def test_deltas_are_pefts_own(tiny_bases: dict[str, Path]) -> None:
    method, family = trained(tiny_bases["sd1"], targets="conv", alpha=5)
    for part, module, a, b in adapter_from(method, family).modules():
        layer = family.parts[part].get_submodule(module)
        ours = delta(a, b, 5 / 3)
        assert torch.allclose(ours, layer.get_delta_weight("default"), atol=1e-6), module


@pytest.mark.parametrize(
    ("family", "part", "module", "key"),
    [
        ("sd1", "denoiser", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
         "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"),
        ("sd1", "text_encoder", "encoder.layers.0.self_attn.q_proj",
         "lora_te_text_model_encoder_layers_0_self_attn_q_proj"),
        ("sd2", "text_encoder", "text_model.encoder.layers.3.mlp.fc1", "lora_te_text_model_encoder_layers_3_mlp_fc1"),
        ("sdxl", "text_encoder", "encoder.layers.0.mlp.fc2", "lora_te1_text_model_encoder_layers_0_mlp_fc2"),
        ("sdxl", "text_encoder_2", "encoder.layers.0.mlp.fc2", "lora_te2_text_model_encoder_layers_0_mlp_fc2"),
    ],
)  # fmt: skip
def test_kohya_names_are_those_that_uis_read(family: str, part: str, module: str, key: str) -> None:
    assert key_of(family, part, module) == key


def test_a_kohya_file_holds_three_tensors_a_module_one_alpha_and_its_metadata(
    tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    method, family = trained(tiny_bases["sdxl"], targets="conv", alpha=2)
    adapter = adapter_from(method, family)
    export_adapter(adapter, Request(tmp_path, "x", "fp16", ABOUT), ["kohya"], bench_of(adapter.base_folder))
    tensors = load_file(tmp_path / "x.safetensors")
    assert len(tensors) == 3 * adapter.count
    alphas = [value for key, value in tensors.items() if key.endswith(".alpha")]
    assert {(value.ndim, float(value)) for value in alphas} == {(0, 2.0)}
    with safe_open(tmp_path / "x.safetensors", "pt") as opened:
        about = opened.metadata()
    assert about["ss_base_model_version"] == "sdxl_base_v1-0"
    assert (about["ss_network_dim"], about["ss_network_alpha"]) == ("3", "2.0")
    assert about["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert about["modelspec.trigger_phrase"] == "zwx mug"
    assert not any("/" in value and "http" not in value and "lora" not in value for value in about.values())


@pytest.mark.parametrize("name", NAMES)
def test_peft_itself_reads_the_peft_folder(name: str, tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """Every part, the text encoders that keep their `text_model.` wrapper too."""
    method, family = trained(tiny_bases[name], alpha=5, parts=["denoiser", "text_encoders"])
    wanted = probe_trained(family)
    (item,) = export_adapter(
        adapter_from(method, family), Request(tmp_path, "x", "fp32", ABOUT), ["peft"], bench_of(family.folder)
    )
    clean = load_family(str(tiny_bases[name]))
    for part in method.part_names(clean):
        model = peft.PeftModel.from_pretrained(clean.parts[part], item.path / part)
        clean.parts[part] = model.base_model.model
    assert torch.allclose(probe_trained(clean), wanted, atol=1e-5)


FAULTS = {
    "missing alpha": lambda t: t.pop(next(k for k in t if k.endswith(".alpha"))),
    "wrong prefix": lambda t: [t.__setitem__(k.replace("lora_unet_", "unet_"), t.pop(k)) for k in list(t)],
    "extra key": lambda t: t.__setitem__("lora_unet_nothing.alpha", torch.tensor(1.0)),
    "not finite": lambda t: t[next(k for k in t if k.endswith("up.weight"))].fill_(float("nan")),
    "a dropped module": lambda t: [t.pop(k) for k in list(t) if "attn1_to_q" in k],
    "another alpha": lambda t: [t.__setitem__(k, torch.tensor(1.0)) for k in list(t) if k.endswith(".alpha")],
    "one other alpha": lambda t: t.__setitem__(next(k for k in t if k.endswith(".alpha")), torch.tensor(9.0)),
    "swapped matrices": lambda t: t.__setitem__(
        (k := next(k for k in t if k.endswith("to_k.lora_up.weight"))), t[k].flip(0).contiguous()
    ),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_planted_faults_are_found(fault: str, tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    method, family = trained(tiny_bases["sd1"], alpha=7)
    adapter = adapter_from(method, family)
    export_adapter(adapter, Request(tmp_path, "x", "fp32", ABOUT), ["kohya"], bench_of(adapter.base_folder))
    path = tmp_path / "x.safetensors"
    tensors = load_file(path)
    FAULTS[fault](tensors)
    save_file(tensors, path)
    found = verify(adapter, EXPORTS["kohya"](), path, torch.float32, bench_of(tiny_bases["sd1"]))
    assert not found.ok
    assert found.read_by == []


def test_a_truncated_file_and_a_strange_one_get_one_sentence(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"12345678 not safetensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "b.safetensors")
    for name, said in (("a", "not a complete safetensors"), ("b", "not a LoRA"), ("c", "no file")):
        with pytest.raises(BadInput, match=said):
            open_adapter(tmp_path / f"{name}.safetensors", str(tiny_bases["sd1"]))


def test_existing_files_and_unknown_formats(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = adapter_from(*trained(tiny_bases["sd1"]))
    with pytest.raises(BadInput, match="did you mean 'kohya'"):
        export_adapter(adapter, Request(tmp_path, "x", "fp16", ABOUT), ["kohja"], bench_of(adapter.base_folder))
    assert list(tmp_path.iterdir()) == []
    export_adapter(adapter, Request(tmp_path, "x", "fp16", ABOUT), ["kohya"], bench_of(adapter.base_folder))
    with pytest.raises(BadInput, match="already exists"):
        export_adapter(adapter, Request(tmp_path, "x", "fp16", ABOUT), ["kohya"], bench_of(adapter.base_folder))


@pytest.mark.parametrize("name", NAMES)
def test_a_full_model_leaves_as_a_folder(name: str, tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    import diffusers

    family = load_family(str(tiny_bases[name]))
    parameters = Full(parts=["denoiser", "text_encoders"]).attach(family, 0)
    with torch.no_grad():
        for value in parameters.values():
            value.add_(0.01)
    item = export_folder(family, tmp_path / "model", "fp16")
    assert item.ok, item.checks
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    pipeline = getattr(diffusers, index["_class_name"]).from_pretrained(tmp_path / "model")
    for key, value in getattr(pipeline, family.sources["denoiser"].folder).state_dict().items():
        assert torch.equal(value.half(), family.parts["denoiser"].state_dict()[key].half())
    first = family.text_encoders[0].replace("text_encoder", "tokenizer")
    assert (tmp_path / "model" / first / "merges.txt").is_file()


def test_a_folder_that_is_not_what_was_trained_fails(tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch) -> None:
    from finetune.export.model import model_folder as folder

    family = load_family(str(tiny_bases["sd1"]))
    parameters = Full().attach(family, 0)
    real = folder.unloaded

    def other(kind: type[Family], path: Path, dtype: torch.dtype) -> Family:
        shutil.copy(tiny_bases["sd1"] / "unet" / "diffusion_pytorch_model.safetensors", path / "unet")
        return real(kind, path, dtype)

    monkeypatch.setattr(folder, "unloaded", other)
    with torch.no_grad():
        next(iter(parameters.values())).add_(0.5)
    assert not export_folder(family, tmp_path / "model", "fp32").ok


LAYERS_OF = {
    "SD 1.5": ("lora_unet_mid_block_attentions_0_proj_in", "lora_te_text_model_encoder_layers_11_mlp_fc2",
               "lora_unet_input_blocks_8_1_transformer_blocks_0_attn2_to_k"),
    "SD 2.1": ("lora_unet_up_blocks_3_attentions_2_proj_out", "lora_unet_output_blocks_11_1_proj_out",
               "lora_te_text_model_encoder_layers_22_mlp_fc2"),
    "SDXL": ("lora_unet_mid_block_attentions_0_transformer_blocks_9_attn2_to_out_0",
             "lora_unet_middle_block_1_proj_in", "lora_te1_text_model_encoder_layers_11_mlp_fc2",
             "lora_te2_text_model_encoder_layers_31_mlp_fc2"),
    "SDXL refiner": ("lora_unet_mid_block_attentions_0_transformer_blocks_3_attn2_to_out_0",
                     "lora_unet_input_blocks_8_1_proj_in", "lora_te2_text_model_encoder_layers_31_mlp_fc2"),
    "SD3 medium": ("lora_unet_joint_blocks_23_x_block_attn_qkv", "transformer.transformer_blocks.23.ff.net.2",
                   "diffusion_model.joint_blocks.0.context_block.mlp.fc1"),
    "SD3.5 medium": ("lora_unet_joint_blocks_12_x_block_attn2_qkv",),
    "SD3.5 large": ("lora_unet_joint_blocks_37_x_block_attn_qkv",),
    "Flux.1 dev": ("lora_unet_double_blocks_18_txt_mlp_2", "lora_unet_single_blocks_37_linear1",
                   "transformer.single_transformer_blocks.37.proj_out",
                   "lora_te1_text_model_encoder_layers_11_mlp_fc2"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_full_size_names_fit_the_published_architectures(name: str, tmp_path: Path) -> None:
    """The published configurations on the meta device: parameter counts, and a name for every LoRA target."""
    title, _, _, millions = PUBLISHED[name]
    folder = write_published(name, tmp_path)
    family = family_of(folder)
    assert family.name == title
    parts = family.skeletons(folder)
    assert round(sum(p.numel() for p in parts["denoiser"].parameters()) / 1e6) == millions
    table = accepted_names(folder)
    assert set(LAYERS_OF[name]) <= table.keys()
    assert round(sum(p.numel() for p in parts["denoiser"].parameters()) / 1e6) == millions
    held = {module for place in key_table(folder).values() if place.part == "denoiser" for module in place.modules}
    nameless = [
        path
        for path, child in parts["denoiser"].named_modules()
        if isinstance(child, torch.nn.Linear | torch.nn.Conv2d) and path not in held
    ]
    last = {"SD3 medium": 23, "SD3.5 medium": 23, "SD3.5 large": 37}.get(name)
    swapped = [f"transformer_blocks.{last}.norm1_context.linear", "norm_out.linear"] if last else ["norm_out.linear"]
    assert nameless == (swapped if FAMILIES[title].naming.joined else [])


@pytest.mark.slow
def test_diffusers_reads_joined_flux_matrices_at_full_size(tmp_path: Path) -> None:
    """Its reader of kohya's Flux keys has 3072 and 12288 written into it, so a tiny base can't ask it."""
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    folder = write_published("Flux.1 dev", tmp_path / "flux")
    shapes = weight_shapes(folder)["denoiser"]
    made = torch.Generator().manual_seed(0)
    chosen = [
        path for path in shapes
        if path.startswith(("transformer_blocks.3.", "single_transformer_blocks.5.")) and ".norm" not in path
    ]  # fmt: skip
    layers = {
        path: (torch.randn(4, shapes[path][1], generator=made), torch.randn(shapes[path][0], 4, generator=made))
        for path in chosen
    }
    adapter = Adapter("flux", folder, {"denoiser": layers}, 0.5)
    (item,) = export_adapter(adapter, Request(tmp_path, "x", "fp32", ABOUT), ["kohya"], bench_of(adapter.base_folder))
    assert item.ok, item.checks
    tensors = load_file(item.path)
    assert tensors["lora_unet_single_blocks_5_linear1.lora_up.weight"].shape == (3 * 3072 + 12288, 16)
    theirs = _convert_kohya_flux_lora_to_diffusers(tensors)
    assert len(theirs) == 2 * len(chosen)
    for path, (a, b) in layers.items():
        again = theirs[f"transformer.{path}.lora_B.weight"] @ theirs[f"transformer.{path}.lora_A.weight"]
        assert torch.allclose(again[:64], 0.5 * (b @ a)[:64], atol=1e-4), path


def test_joined_matrices_come_apart_again() -> None:
    """Some modules missing, some zero, ranks that differ: every delta is the old one, and nothing is invented."""
    made = torch.Generator().manual_seed(0)
    place = Place("denoiser", ("q", "k", "v"), (4, 4, 6))
    pairs = [
        (torch.randn(r, 8, generator=made), torch.randn(n, r, generator=made)) for r, n in ((2, 4), (3, 4), (1, 6))
    ]
    for missing in (None, 0, 1, 2):
        held = [None if n == missing else pair for n, pair in enumerate(pairs)]
        again = split(*join(held, place.rows), place)
        assert again.keys() == {name for name, pair in zip("qkv", held, strict=True) if pair is not None}
        for name, pair in zip("qkv", held, strict=True):
            if pair is not None:
                assert torch.equal(again[name][1] @ again[name][0], pair[1] @ pair[0])
    silent = [pairs[0], (pairs[1][0], torch.zeros(4, 3)), pairs[2]]
    assert split(*join(silent, place.rows), place).keys() == {"q", "k", "v"}
    dense = (torch.randn(5, 8, generator=made), torch.randn(14, 5, generator=made))
    whole = torch.cat([b @ a for a, b in split(*dense, place).values()])
    assert torch.allclose(whole, dense[1] @ dense[0], atol=1e-5)


def test_an_adapter_is_library_free(tiny_bases: dict[str, Path]) -> None:
    adapter = adapter_from(*trained(tiny_bases["sd1"]))
    assert isinstance(adapter, Adapter)
    assert all(type(a) is torch.Tensor and a.dtype == torch.float32 for _, _, a, _ in adapter.modules())


def test_an_adapter_too_faint_for_fp16_is_told_to_leave_as_fp32(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    layer = {"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": None}
    family = load_family(str(tiny_bases["sd1"]))
    weight = dict(family.parts["denoiser"].named_modules())[next(iter(layer))].weight
    torch.manual_seed(0)
    pair = (torch.randn(2, weight.shape[1]) * 0.1, torch.randn(weight.shape[0], 2) * 1e-12)
    faint = Adapter("sd1", tiny_bases["sd1"], {"denoiser": {next(iter(layer)): pair}}, 1.0)
    dtypes = ("fp16", "fp32")
    half, single = (
        export_adapter(faint, Request(tmp_path / d, "x", d, ABOUT), ["kohya"], bench_of(faint.base_folder))[0]
        for d in dtypes
    )
    assert any("export in fp32" in check.message for check in half.checks)
    assert single.ok
    small = Adapter("sd1", tiny_bases["sd1"], {"denoiser": {next(iter(layer)): (pair[0], pair[1] * 1e6)}}, 1.0)
    (item,) = export_adapter(
        small, Request(tmp_path / "small", "x", "fp16", ABOUT), ["kohya"], bench_of(small.base_folder)
    )
    assert item.ok, item.checks  # 1e-6 beside .1: shared between the two matrices, fp16 holds both
