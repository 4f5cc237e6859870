"""LoRA files as readers see them: names, headers that agree with the tensors, hashes, and files of older versions."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from safetensors import safe_open
from safetensors.torch import load_file, save
from test_export import ABOUT, NAMES, bench_of, trained

from finetune.export.adapter import adapter_from, export_adapter
from finetune.export.base import Adapter, Request
from finetune.export.lora.kohya import key_table
from finetune.export.metadata import adapter_metadata, with_numbers
from finetune.export.registry import EXPORTS
from finetune.families.registry import FAMILIES, denoiser_config
from finetune.testing.published import write as write_published

BOTH = ["denoiser", "text_encoders"]
MODULE = {"flux": "networks.lora_flux", "sd3": "networks.lora_sd3"}


def written(
    base: Path, folder: Path, formats: list[str], about: dict[str, str] = ABOUT, **settings: object
) -> Adapter:
    adapter = adapter_from(*trained(base, **{"parts": BOTH, "targets": "conv", "alpha": 7} | settings))
    request = Request(folder, "x", "fp16", about, force=True)
    items = export_adapter(adapter, request, formats, bench_of(base, torch.float32))
    assert all(item.ok for item in items), items
    return adapter


def header(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


def matrices(tensors: dict[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    """The down matrices of a file in either form."""
    return (value for key, value in tensors.items() if key.endswith((".lora_down.weight", ".lora_A.weight")))


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
@pytest.mark.parametrize("name", NAMES)
def test_the_header_says_what_the_tensors_hold(
    name: str, form: str, tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    written(tiny_bases[name], tmp_path, [form])
    file = EXPORTS[form]().path(tmp_path, "x", name)
    tensors, said = load_file(file), header(file)
    assert int(said["ss_network_dim"]) == max(len(a) for a in matrices(tensors))
    alphas = [value for key, value in tensors.items() if key.endswith(".alpha")]
    if form == "kohya":
        assert {(value.ndim, value.dtype) for value in alphas} == {(0, torch.float32)}
        assert {float(value) for value in alphas} == {float(said["ss_network_alpha"])}
    else:
        about = json.loads(said["lora_adapter_metadata"])
        assert alphas == []
        assert {about[key] for key in about if key.endswith(".lora_alpha")} == {float(said["ss_network_alpha"])}
        assert {about[key] for key in about if key.endswith(".r")} == {int(said["ss_network_dim"])}
        if FAMILIES[name].naming.joined:  # the UIs read no header: the tensors must hold alpha = rank
            assert float(said["ss_network_alpha"]) == float(said["ss_network_dim"])
    assert said["ss_network_module"] == MODULE.get(name, "networks.lora")
    assert said["modelspec.architecture"].endswith("/lora")
    assert (said["ss_resolution"], said["modelspec.resolution"]) == ("(32, 32)", "32x32")
    assert said["ss_clip_skip"] == "None"


@pytest.mark.parametrize("name", ["sd1", "flux"])
def test_hashes_are_those_of_the_bytes_on_disk(name: str, tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """Computed from the file itself. The old hash is of 64 KiB from 1 MiB on, here of nothing: the file is short."""
    written(tiny_bases[name], tmp_path, ["kohya"])
    content, said = (tmp_path / "x.safetensors").read_bytes(), header(tmp_path / "x.safetensors")
    whole = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    assert (said["sshs_model_hash"], said["modelspec.hash_sha256"]) == (whole, f"0x{whole}")
    kept = {key: value for key, value in said.items() if key.startswith("ss_")}
    plain = save(load_file(tmp_path / "x.safetensors"), kept)
    assert said["sshs_legacy_hash"] == hashlib.sha256(plain[0x100000:0x110000]).hexdigest()[:8]


def test_the_old_hash_of_a_file_that_reaches_so_far() -> None:
    """Beyond 1 MiB; and with a header that is itself longer, whose order safetensors leaves to chance."""
    tensors = {"a": torch.arange(700_000, dtype=torch.float32), "b": torch.ones(3)}
    said = with_numbers({"ss_v2": "False", "modelspec.title": "x"}, tensors, 4, 2.0)
    kept = {"ss_v2": "False", "ss_network_dim": "4", "ss_network_alpha": "2.0"}
    plain = save(tensors, kept)
    assert said["sshs_legacy_hash"] == hashlib.sha256(plain[0x100000:0x110000]).hexdigest()[:8]
    assert said["sshs_legacy_hash"] != hashlib.sha256(b"").hexdigest()[:8]
    long = {f"ss_{number}": "x" * 200_000 for number in range(8)}
    assert len({with_numbers(long, tensors, 4, 2.0)["sshs_legacy_hash"] for _ in range(5)}) == 1


@pytest.mark.parametrize(
    ("name", "config", "architecture"),
    [
        ("flux", {"guidance_embeds": True}, "flux-1-dev/lora"),
        ("flux", {"guidance_embeds": False}, "flux-1-schnell/lora"),
        ("sd3", {"qk_norm": None}, "stable-diffusion-3-medium/lora"),
        ("sd3", {"qk_norm": "rms_norm", "dual_attention_layers": [0]}, "stable-diffusion-3-5-medium/lora"),
        ("sd3", {"qk_norm": "rms_norm", "dual_attention_layers": []}, "stable-diffusion-3-5-large/lora"),
        ("sdxl", {}, "stable-diffusion-xl-v1-base/lora"),
    ],
)
def test_variants_of_a_base_are_told_apart(
    name: str, config: dict[str, object], architecture: str, tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_bases[name], tmp_path / "base")
    file = base / FAMILIES[name].sources["denoiser"].folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    adapter = Adapter(name, base, {"denoiser": {"x": (torch.ones(1, 1), torch.ones(1, 1))}}, 1.0)
    assert adapter_metadata(adapter, ABOUT, False)["modelspec.architecture"] == architecture


def test_facts_about_the_run_are_in_kohyas_fields(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    tags = json.dumps({"zwx mug": {"zwx mug": 3}})
    about = ABOUT | {"started": "1763700000.0", "train_images": "5", "tag_frequency": tags}
    written(tiny_bases["sd1"], tmp_path, ["kohya"], about, parts=["denoiser"], targets="attention")
    said = header(tmp_path / "x.safetensors")
    assert (said["ss_training_started_at"], said["ss_num_train_images"]) == ("1763700000.0", "5")
    assert said["ss_tag_frequency"] == tags
    assert not {"finetune_started", "finetune_train_images", "finetune_tag_frequency"} & said.keys()


SDXL_NAMES = {  # as in published SDXL files
    "lora_unet_input_blocks_1_0_in_layers_2", "lora_unet_input_blocks_2_0_emb_layers_1",
    "lora_unet_input_blocks_2_0_out_layers_3", "lora_unet_input_blocks_3_0_op",
    "lora_unet_input_blocks_4_0_skip_connection", "lora_unet_input_blocks_4_1_proj_in",
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    "lora_unet_middle_block_0_in_layers_2", "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj",
    "lora_unet_output_blocks_2_2_conv", "lora_unet_output_blocks_5_1_transformer_blocks_1_attn2_to_out_0",
    "lora_unet_output_blocks_8_0_skip_connection", "lora_te1_text_model_encoder_layers_11_mlp_fc2",
    "lora_te2_text_model_encoder_layers_31_self_attn_out_proj",
}  # fmt: skip


def test_sdxl_has_the_original_names_throughout(tmp_path: Path) -> None:
    """At full size. diffusers' own mapping of these names puts every module back in its place."""
    table = key_table(write_published("SDXL", tmp_path))
    assert table.keys() >= SDXL_NAMES
    unet = {key: place.modules[0] for key, place in table.items() if place.part == "denoiser" and "norm" not in key}
    assert not [key for key in unet if "down_blocks" in key or "up_blocks" in key or "mid_block" in key]
    held = {
        module: key for key, module in unet.items() if module.rpartition(".")[2] not in ("norm1", "norm2", "norm3")
    }
    held = {module: key for module, key in held.items() if not module.endswith(("conv_norm_out", ".norm"))}
    tensors = {}
    for number, key in enumerate(held.values()):
        tensors[f"{key}.lora_down.weight"] = torch.full((1, 1), float(number))
        tensors[f"{key}.lora_up.weight"], tensors[f"{key}.alpha"] = torch.ones(1, 1), torch.tensor(1.0)
    config = SimpleNamespace(**{"layers_per_block": 2} | denoiser_config(tmp_path))
    theirs, _ = _convert_non_diffusers_lora_to_diffusers(_maybe_map_sgm_blocks_to_diffusers(tensors, config))
    found = {plain(key): float(value) for key, value in theirs.items() if ".down." in key or ".lora_A." in key}
    assert found == {module: float(number) for number, module in enumerate(held)}


def plain(key: str) -> str:
    """A module's path in a key that diffusers made: older forms of its names for attention too."""
    path = key.removeprefix("unet.").removesuffix(".weight").removesuffix(".lora_A").removesuffix(".down")
    path = path.removesuffix(".lora").replace(".processor", "").removesuffix("_lora")
    return f"{path}.0" if path.endswith(".to_out") else path


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_the_joined_file_is_what_uis_are_pointed_to(name: str, tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    written(tiny_bases[name], tmp_path, ["kohya", "diffusers"])
    assert sorted(file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*.safetensors")) == [
        "x-diffusers/pytorch_lora_weights.safetensors", "x.safetensors",
    ]  # fmt: skip
    names = {key.split(".")[0] for key in load_file(tmp_path / "x.safetensors")}
    assert any(key.endswith("_qkv") for key in names)
    assert {key.split("_")[1] for key in names} >= {"unet", "te1"}
    written(tiny_bases[name], tmp_path / "plain", ["kohya"], parts=["denoiser"])
    assert all(key.startswith("lora_unet_") for key in load_file(tmp_path / "plain" / "x.safetensors"))


def test_a_read_back_joined_file_has_one_alpha_and_no_other_delta(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """Another reader's rule, alpha / rank of each name, gives the trained deltas though the ranks differ."""
    adapter = written(tiny_bases["flux"], tmp_path, ["kohya"], parts=["denoiser"])
    tensors, table = load_file(tmp_path / "x.safetensors"), key_table(tiny_bases["flux"])
    ranks = set()
    for key, place in table.items():
        if f"{key}.alpha" not in tensors:
            continue
        a, b = tensors[f"{key}.lora_down.weight"].float(), tensors[f"{key}.lora_up.weight"].float()
        ranks.add(len(a))
        found = float(tensors[f"{key}.alpha"]) / len(a) * (b @ a)
        pairs = [adapter.layers["denoiser"].get(module) for module in place.modules]
        wanted = [
            torch.zeros(rows, a.shape[1]) if pair is None else adapter.scale * (pair[1] @ pair[0])
            for pair, rows in zip(pairs, place.rows, strict=True)
        ]
        assert torch.allclose(found, torch.cat(wanted), atol=5e-3), key
    assert ranks == {3, 12}  # doublings of the rank: what is moved into the up matrices is exact in fp16
