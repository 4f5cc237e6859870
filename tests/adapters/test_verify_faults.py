"""verify names each fault with what every reader makes of it, and never says "fully" beside one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from adapter_files import Spoil, Tensors, kohya_file, published, saved, scales_header
from safetensors.torch import load_file, save_file

from finetune.adapters.inspection import inspect_adapter
from finetune.adapters.operations import verify_file
from finetune.cli.main import run
from finetune.export.base import delta
from finetune.families.registry import weight_shapes
from finetune.families.source import load_family
from finetune.methods.peft_adapter import active_lora

CONV, QUERY = "lora_unet_mid_block_resnets_0_conv1", "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
WIDE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"


def exchange(tensors: Tensors, name: str = WIDE) -> None:
    tensors[name + DOWN], tensors[name + UP] = tensors[name + UP], tensors[name + DOWN]


def transpose(tensors: Tensors, name: str = WIDE) -> None:
    for ending in (DOWN, UP):
        tensors[name + ending] = tensors[name + ending].T.contiguous()


def fill(tensors: Tensors, key: str, value: float) -> None:
    tensors[key] = torch.full_like(tensors[key], value)


def zero_ups(tensors: Tensors) -> None:
    for key in [key for key in tensors if key.endswith(UP)]:
        tensors[key] = torch.zeros_like(tensors[key])


def rename_one(tensors: Tensors, old: str, new: str) -> None:
    for key in [key for key in tensors if key.startswith(old + ".")]:
        tensors[key.replace(old, new)] = tensors.pop(key)


# fault -> how to make it; its name; ComfyUI, Forge, A1111, InvokeAI, sdnext and diffusers (which reads it here)
SGM = "lora_unet_middle_block_0_in_layers_2"
FAULTS: dict[str, tuple[Spoil, str, str]] = {
    "no up": (lambda t: t.pop(QUERY + UP), "one-matrix", "partly partly refused refused partly refused"),
    "no down": (lambda t: t.pop(QUERY + DOWN), "one-matrix", "refused refused refused refused partly refused"),
    "3x3 as 1x1": (lambda t: t.update({CONV + DOWN: t[CONV + DOWN][..., :1, :1].clone()}), "one-by-one",
                   "partly refused wrongly refused wrongly refused"),
    "exchanged": (exchange, "exchanged", "partly refused partly refused partly refused"),
    "exchanged, square": (lambda t: exchange(t, QUERY), "exchanged", "partly refused partly refused partly refused"),
    "transposed": (transpose, "transposed", "partly refused partly refused partly refused"),
    "transposed, square": (lambda t: transpose(t, QUERY), "exchanged",
                           "partly refused partly refused partly refused"),
    "no alpha": (lambda t: t.pop(QUERY + ALPHA), "no-alpha", "unknown unknown unknown unknown unknown unknown"),
    "one alpha doubled": (lambda t: fill(t, QUERY + ALPHA, 4.0), "odd-alpha",
                          "rightly rightly rightly rightly rightly wrongly"),
    "NaN": (lambda t: fill(t, QUERY + UP, float("nan")), "not-finite",
            "wrongly wrongly wrongly wrongly wrongly wrongly"),
    "infinite": (lambda t: fill(t, QUERY + DOWN, float("inf")), "not-finite",
                 "wrongly wrongly wrongly wrongly wrongly wrongly"),
    "infinite alpha": (lambda t: fill(t, QUERY + ALPHA, float("inf")), "not-finite",
                       "wrongly wrongly wrongly wrongly wrongly wrongly"),
    "all ups zero": (zero_ups, "all-zero", "wrongly wrongly wrongly wrongly wrongly wrongly"),
    "two kinds of names": (lambda t: rename_one(t, CONV, SGM), "mixed-names",
                           "rightly rightly rightly refused rightly rightly"),
    "whole numbers": (lambda t: t.update({QUERY + UP: t[QUERY + UP].to(torch.int8)}), "not-floating",
                      "unknown unknown unknown unknown unknown unknown"),
    "an alpha of its own": (lambda t: t.update({"lora_unet_x.alpha": torch.tensor(1.0)}), "unknown-keys",
                            "partly partly partly partly partly rightly"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound() -> Tensors:
    tensors = kohya_file(published("sd1"))
    return {key: value for key, value in tensors.items() if "mid_block" in key or "attn2_to_k" in key}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_has_its_consequence_for_each_reader(fault: str, sound: Tensors, tmp_path: Path) -> None:
    spoil, name, states = FAULTS[fault]
    tensors = {key: value.clone() for key, value in sound.items()}
    spoil(tensors)
    found = verify_file(saved(tensors, tmp_path / "bad.safetensors", {"ss_base_model_version": "sd_v1"}))
    assert [problem.name for problem in found.problems] == [name]
    uis = " ".join(states.split()[:-1])
    assert " ".join(state for reader, (state, _) in found.verdicts.items() if reader != "diffusers") == uis
    assert all(why for state, why in found.verdicts.values())
    assert "fully" not in [state for state, _ in found.verdicts.values()]


def test_a_sound_file_is_read_fully(sound: Tensors, tmp_path: Path) -> None:
    found = verify_file(saved(sound, tmp_path / "x.safetensors", {"ss_base_model_version": "sd_v1"}))
    assert (found.problems, found.notes) == ([], [])
    assert {state for reader, (state, _) in found.verdicts.items() if reader != "diffusers"} == {"fully"}
    assert found.verdicts["diffusers"][0] == "unknown"  # there are no weights to load it into


@pytest.fixture(scope="module")
def small(tiny_bases: dict[str, Path]) -> Tensors:
    return kohya_file(tiny_bases["sd1"])


@pytest.mark.parametrize("fault", ["one alpha doubled", "no up", "no down", "exchanged", "NaN", "all zero"])
def test_diffusers_own_loader_is_never_said_to_read_a_fault_fully(
    fault: str, small: Tensors, tiny_bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {key: value.clone() for key, value in small.items()}
    query = next(key for key in tensors if key.endswith(f"attn2_to_k{DOWN}")).removesuffix(DOWN)
    changes: dict[str, Spoil] = {
        "one alpha doubled": lambda t: fill(t, query + ALPHA, 4.0), "no up": lambda t: t.pop(query + UP),
        "no down": lambda t: t.pop(query + DOWN), "exchanged": lambda t: exchange(t, query),
        "NaN": lambda t: fill(t, query + UP, float("nan")), "all zero": zero_ups,
    }  # fmt: skip
    changes[fault](tensors)
    code, _ = run(["verify", str(saved(tensors, tmp_path / "x.safetensors")), "--base", str(tiny_bases["sd1"])])
    said = capsys.readouterr().out
    assert code == 1
    assert "diffusers  " in said
    assert not re.search(r"\bfully\b", said)


def test_a_header_with_another_alpha_is_for_diffusers_alone(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """UIs take scale 1 in place of alpha / rank = 2. Where UIs read such files (Flux), that is a problem."""
    for name, prefix, module in (
        ("sd1", "unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"),
        ("flux", "transformer", "transformer_blocks.0.attn.to_q"),
    ):
        shape = weight_shapes(tiny_bases[name])["denoiser"][module]
        key = f"{prefix}.{module}"
        tensors = {f"{key}.lora_A.weight": torch.ones(2, shape[1]), f"{key}.lora_B.weight": torch.ones(shape[0], 2)}
        file = saved(tensors, tmp_path / f"{name}.safetensors", scales_header(prefix, rank=2, alpha=4.0))
        found = verify_file(file, str(tiny_bases[name]))
        assert found.scales == {2.0: 1}
        assert found.adapter is not None
        a, b = found.adapter.layers["denoiser"][module]
        assert torch.equal(delta(a, b, found.adapter.scale), torch.full(tuple(shape), 4.0))  # 2 * (2 x 1 x 1)
        if name == "flux":
            assert [problem.name for problem in found.problems] == ["header-alpha"]
            assert {found.verdicts[ui][0] for ui in ("ComfyUI", "Forge", "InvokeAI")} == {"wrongly"}
            assert found.verdicts["diffusers"][0] == "rightly"
        else:
            assert found.problems == []
            assert "header's 2" in found.verdicts["ComfyUI"][1]
            assert found.verdicts["diffusers"][0] == "fully"


def test_each_part_has_its_own_alpha_in_the_header(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """As diffusers' loader applies it, which is the independent reader here."""
    shapes = weight_shapes(tiny_bases["sd1"])
    unet, text = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "encoder.layers.0.self_attn.q_proj"
    made, tensors = torch.Generator().manual_seed(0), {}
    for key, shape in (
        (f"unet.{unet}", shapes["denoiser"][unet]),
        (f"text_encoder.{text}", shapes["text_encoder"][text]),
    ):
        tensors[f"{key}.lora_A.weight"] = torch.randn(2, shape[1], generator=made)
        tensors[f"{key}.lora_B.weight"] = torch.randn(shape[0], 2, generator=made)
    about = {"unet.r": 2, "unet.lora_alpha": 6, "unet.target_modules": ["to_q"]}
    about |= {"text_encoder.r": 2, "text_encoder.lora_alpha": 1, "text_encoder.target_modules": ["q_proj"]}
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(about)})
    found = verify_file(tmp_path / "x.safetensors", str(tiny_bases["sd1"]))
    assert found.scales == {3.0: 1, 0.5: 1}
    assert found.verdicts["diffusers"][0] == "fully"


def old_keys(form: str, part: str, module: str) -> str:
    """The start of a key, as diffusers' training scripts wrote it before PEFT."""
    prefix = "unet" if part == "denoiser" else "text_encoder"
    path = module if part == "denoiser" else f"text_model.{module}"
    if form == "processor":
        return f"{prefix}.{path.replace('.to_', '.processor.to_').removesuffix('.0')}_lora"
    return f"{prefix}.{path}.{form}"


OLD = {
    "lora": ("denoiser", ("attn1.to_q", "attn2.to_out.0", "ff.net.2")),
    "processor": ("denoiser", ("attn1.to_q", "attn2.to_k", "attn2.to_out.0")),
    "lora_linear_layer": ("text_encoder", ("self_attn.q_proj", "self_attn.out_proj")),
}


@pytest.mark.parametrize("form", OLD)
def test_files_of_diffusers_old_scripts_are_read_as_diffusers_reads_them(
    form: str, tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    part, words = OLD[form]
    made, tensors = torch.Generator().manual_seed(0), {}
    for module, shape in weight_shapes(tiny_bases["sd1"])[part].items():
        if module.endswith(words):
            key = old_keys(form, part, module)
            tensors[f"{key}.down.weight"] = torch.randn(2, shape[1], generator=made)
            tensors[f"{key}.up.weight"] = torch.randn(shape[0], 2, generator=made)
    file = saved(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    found = inspect_adapter(file, str(tiny_bases["sd1"]))
    assert found.kind == "old diffusers"
    assert found.problems == []
    assert any("used the rank" in note for note in found.notes)
    assert found.adapter is not None
    family = load_family(str(tiny_bases["sd1"]))
    family.drawing.pipeline().load_lora_weights(str(tmp_path), weight_name=file.name)
    theirs = {path: delta(a, b, scale) for path, a, b, scale in active_lora(family.parts[part])}
    ours = {path: delta(a, b, found.adapter.scale) for path, (a, b) in found.adapter.layers[part].items()}
    assert ours.keys() == theirs.keys()
    assert len(ours) == len(tensors) // 2
    assert all(torch.allclose(ours[path], theirs[path], atol=1e-5) for path in ours)


def test_old_keys_that_diffusers_no_longer_reads_are_converted(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """Without "unet." (save_attn_procs) or as lora_linear_layer of the UNet: read here, and then by all."""
    module = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    width = weight_shapes(tiny_bases["sd1"])["denoiser"][module][0]
    for key in (f"unet.{module}.lora_linear_layer", f"{module.replace('.to_q', '.processor.to_q')}_lora"):
        tensors = {f"{key}.down.weight": torch.ones(2, width), f"{key}.up.weight": torch.ones(width, 2)}
        file = saved(tensors, tmp_path / "old.safetensors")
        base = ["--base", str(tiny_bases["sd1"])]
        assert run(["convert", str(file), "--out", str(tmp_path / "new.safetensors"), "--force", *base]) == (0, "")
        written = load_file(tmp_path / "new.safetensors")
        (up,) = [value for name, value in written.items() if name.endswith(UP)]
        (down,) = [value for name, value in written.items() if name.endswith(DOWN)]
        assert torch.allclose(up @ down, torch.full((width, width), 2.0))


@pytest.mark.parametrize("base", [None, "sd1"])
def test_a_file_of_another_method_is_named_once_and_not_called_refused(base: str | None, tmp_path: Path) -> None:
    """UIs read OFT, and only this command does not judge it. The header alone tells the base."""
    tensors = {f"{QUERY}.oft_blocks": torch.ones(4, 4, 4), QUERY + ALPHA: torch.tensor(4.0)}
    file = saved(tensors, tmp_path / "oft.safetensors", {"ss_base_model_version": "sd_v1"})
    found = inspect_adapter(file, str(published(base)) if base else None)
    assert found.family == "sd1"
    assert [problem.name for problem in found.problems] == ["other-method"]
    assert "OFT" in found.problems[0].line
    assert {state for state, _ in found.verdicts.values()} == {"unknown"}


def test_an_alpha_without_any_matrix_is_still_named(tmp_path: Path) -> None:
    tensors = {f"{QUERY}.hada_w1_a": torch.ones(4, 4), WIDE + ALPHA: torch.tensor(4.0)}
    found = inspect_adapter(saved(tensors, tmp_path / "loha.safetensors"), str(published("sd1")))
    assert found.unknown_keys == [WIDE + ALPHA]
