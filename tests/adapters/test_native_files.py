"""verify on LoHa, LoKr and DoRA files in LyCORIS' format: a sound one has no problem, each fault is still named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import Tensors, published, saved
from safetensors.torch import load_file

from finetune.adapters.inspection import inspect_adapter
from finetune.cli.main import run
from finetune.export.base import Request
from finetune.export.lora.lycoris import Lycoris, module_names
from finetune.export.native import export_native
from finetune.families.registry import FAMILIES, family_of, weight_shapes
from finetune.families.source import load_family
from finetune.methods.registry import METHODS

KINDS = {"loha": "LoHa", "lokr": "LoKr", "dora": "DoRA"}
ABOUT = {"title": "x", "resolution": "64x64", "trigger_phrase": "", "base_hash": "0" * 64}
WIDE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
FIRST = {"loha": "hada_w1_a", "lokr": "lokr_w1", "dora": "lora_up.weight"}


def written(base: Path, kind: str, path: Path) -> Path:
    """A file of a run's own export, with values that are not zero."""
    family = load_family(str(base))
    targets = "all-linear" if family.naming.joined else "conv"
    settings = {"factor": 2} if kind == "lokr" else {}
    method: Any = METHODS[kind](rank=3, alpha=6, **settings, parts=["denoiser", "text_encoders"], targets=targets)
    made = torch.Generator().manual_seed(1)
    for parameter in method.attach(family, 0).values():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=made)
    item = export_native(Lycoris(), method, family, Request(path, "x", "fp32", ABOUT))
    assert item.ok, item.checks
    return item.path


@pytest.mark.parametrize("name", ["sd1", "sdxl", "flux", "sd3"])
@pytest.mark.parametrize("kind", KINDS)
def test_our_own_file_has_no_problem(
    kind: str, name: str, tiny_bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tiny_bases[name], kind, tmp_path)
    assert run(["verify", str(file), "--base", str(tiny_bases[name])]) == (0, "")
    said = capsys.readouterr().out
    assert f"{KINDS[kind]} in LyCORIS' format for {name}, " in said.splitlines()[0]
    assert "LoRA" not in said.splitlines()[0].replace(KINDS[kind], "")
    assert "PROBLEM" not in said
    assert "it is not compared with a LoRA" in said
    found = inspect_adapter(file, str(tiny_bases[name]))
    assert found.parts.total() == len({key.partition(".")[0] for key in load_file(file)})
    readers = FAMILIES[name].naming.known_readers
    assert found.verdicts == {program: readers.verdict(kind, program) for program in found.verdicts}
    assert found.verdicts["ComfyUI"] == ("fully", "")
    assert found.verdicts["diffusers"][0] == ("wrongly" if kind == "dora" and name in ("sd1", "sdxl") else "refused")
    code, message = run(["convert", str(file), "--out", str(tmp_path / "y"), "--base", str(tiny_bases[name])])
    assert code == 2
    assert f"is {KINDS[kind]} in LyCORIS' format, and not a plain LoRA" in message


def drop(tensors: Tensors, kind: str) -> None:
    del tensors[f"{WIDE}.{FIRST[kind]}"]


def widen(tensors: Tensors, kind: str) -> None:
    key = f"{WIDE}.{FIRST[kind]}"
    tensors[key] = torch.cat([tensors[key], tensors[key]])


def spoil(tensors: Tensors, kind: str) -> None:
    tensors[f"{WIDE}.{FIRST[kind]}"].view(-1)[0] = float("nan")


def rename(tensors: Tensors, kind: str) -> None:
    for key in [key for key in tensors if key.startswith(f"{WIDE}.")]:
        tensors[key.replace(WIDE, "lora_unet_nowhere")] = tensors.pop(key)


FAULTS: dict[str, tuple[Callable[[Tensors, str], None], str, str]] = {
    "half a pair": (drop, "one-matrix", "modules without their "),
    "another shape": (widen, "another-shape", "another shape"),
    "NaN": (spoil, "not-finite", "NaN"),
    "unknown names": (rename, "unknown-keys", "lora_unet_nowhere"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_is_still_a_problem(
    kind: str, fault: str, tiny_bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant, name, words = FAULTS[fault]
    tensors = load_file(written(tiny_bases["sd1"], kind, tmp_path))
    plant(tensors, kind)
    file = saved(tensors, tmp_path / "bad.safetensors", {"finetune_base_hash": "0" * 64})
    code, message = run(["verify", str(file), "--base", str(tiny_bases["sd1"])])
    assert code == 1
    assert "has 1 problem: see" in message
    assert words in capsys.readouterr().out
    found = inspect_adapter(file, str(tiny_bases["sd1"]))
    assert [problem.name for problem in found.problems] == [name]
    assert not {"fully", "rightly"} & {state for state, _ in found.verdicts.values()}


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3.5-medium", "flux-dev"])
def test_names_and_sizes_tell_the_base(name: str, tmp_path: Path) -> None:
    """A LoHa of another trainer, without a header."""
    weights, tensors = weight_shapes(published(name)), {}
    for (part, path), module in list(module_names(published(name)).items())[::9]:
        shape = weights[part][path]
        for side in "12":
            tensors[f"{module}.hada_w{side}_a"] = torch.ones(shape[0], 2)
            tensors[f"{module}.hada_w{side}_b"] = torch.ones(2, shape[1:].numel())
        tensors[f"{module}.alpha"] = torch.tensor(2.0)
    found = inspect_adapter(saved(tensors, tmp_path / "x.safetensors"))
    assert found.compared.folder.name == name
    assert found.family == family_of(published(name)).name
    assert found.problems == []
    assert (found.ranks, found.scales) == ({2: found.parts.total()}, {1.0: found.parts.total()})


def test_a_dora_of_another_trainer_is_not_judged_by_our_rule(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(written(tiny_bases["sd1"], "dora", tmp_path))
    found = inspect_adapter(saved(tensors, tmp_path / "y.safetensors"), str(tiny_bases["sd1"]))
    assert found.problems == []
    assert found.verdicts["ComfyUI"][0] == found.verdicts["sdnext"][0] == "unknown"
    assert found.verdicts["diffusers"] == ("wrongly", "it drops dora_scale")


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"emb_params": (2, 768)}, "emb_params (2 vectors of width 768)"),
        ({"clip_l": (1, 768), "clip_g": (1, 1280)}, "clip_g (1 vector of width 1280), clip_l (1 vector of width 768)"),
    ],
)
def test_an_embedding_is_named(shapes: dict[str, tuple[int, int]], words: str, tmp_path: Path) -> None:
    file = saved({key: torch.ones(shape) for key, shape in shapes.items()}, tmp_path / "word.safetensors")
    code, message = run(["verify", str(file)])
    assert code == 2
    assert f"is an embedding (textual inversion) of {words}" in message
    assert "not a LoRA" not in message
