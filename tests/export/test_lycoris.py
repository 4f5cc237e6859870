"""LoHa, LoKr and DoRA leave as they were trained. The files are read by the papers' formulas, written here."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_export import ABOUT, NAMES, bench_of, probe_trained
from test_peft_kinds import SETTINGS, attached
from test_svd import recipe_of, relative
from torch import Tensor

from finetune.cli.main import run
from finetune.core.errors import BadInput
from finetune.export.base import Exported, Request
from finetune.export.lora import lycoris as module
from finetune.export.lora.lycoris import Lycoris, module_names
from finetune.export.native import export_native, open_native, trained_prediction, with_prediction
from finetune.export.registry import check_formats, formats_for
from finetune.families.base import Family
from finetune.families.source import load_family
from finetune.jobs import train as job
from finetune.jobs.open import open_exported, open_result
from finetune.methods.registry import METHODS
from finetune.runs.folder import RunFolder

KINDS = ["dora", "loha", "lokr"]
PARTS = ["denoiser", "text_encoders"]


def weight_of(tensors: dict[str, Tensor], base: Tensor) -> Tensor:
    """The weight that a UI computes at strength 1, in float64, with sums that are written out."""
    t, w = {name: value.double() for name, value in tensors.items()}, base.double()
    if "dora_scale" in t:  # arXiv:2402.09353 eq. 5, but with the norm of W, as in ComfyUI and Forge
        down = t["lora_down.weight"].flatten(1)
        moved = w.flatten(1) + t["alpha"] / len(down) * torch.einsum("or,ri->oi", t["lora_up.weight"].flatten(1), down)
        rows = [m * row / old.square().sum().sqrt() for m, row, old in zip(t["dora_scale"], moved, w, strict=True)]
        return torch.stack([row.flatten() for row in rows]).view_as(w)
    if "hada_w1_a" in t:  # arXiv:2108.06098 proposition 1
        scale = t["alpha"] / t["hada_w1_b"].shape[0]
        names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        return w + scale * torch.einsum("or,ri,os,si->oi", *(t[name] for name in names)).view_as(w)
    if "lokr_w2" in t:  # arXiv:2309.14859 section 3.3: block (i, j) is c_ij M; no alpha where both are whole
        assert "alpha" not in t
        big, scale = t["lokr_w2"], 1.0
    else:
        big, scale = t["lokr_w2_a"] @ t["lokr_w2_b"], float(t["alpha"] / t["lokr_w2_b"].shape[0])
    small = t["lokr_w1"]
    big = big.view(len(w) // len(small), w.shape[1] // small.shape[1], *w.shape[2:])
    return w + scale * torch.cat([torch.cat([c * big for c in row], 1) for row in small], 0)


def written(name: str, kind: str, base: Path, folder: Path) -> tuple[Any, Family, Exported]:
    """A trained adapter on all its layers, whole and decomposed LoKr matrices among them, and its file."""
    settings = dict(SETTINGS[kind])
    if load_family(str(base)).naming.joined:
        settings["targets"] = "all-linear"
    method, family = attached(base, kind, parts=PARTS, **settings)
    request = Request(folder, f"{name}-{kind}", "fp16", ABOUT)
    return method, family, export_native(Lycoris(), method, family, request)


def held_in(path: Path) -> dict[str, dict[str, Tensor]]:
    held: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(path).items():
        place, name = key.split(".", 1)
        held.setdefault(place, {})[name] = value
    return held


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_module_of_the_file_is_the_trained_weight(
    name: str, kind: str, tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    """PEFT's layer, merged, against the formulas on the file alone: linear layers, 1x1 and 3x3 convolutions."""
    method, family, item = written(name, kind, tiny_bases[name], tmp_path)
    held, names = held_in(item.path), module_names(tiny_bases[name])
    forms = set()
    for part, path, layer in method.layers(family):
        base, tensors = layer.get_base_layer().weight.detach(), held.pop(names[part, path])
        wanted = base.double() + method.delta(layer).detach().double()
        assert relative(weight_of(tensors, base), wanted) < 1e-6, path
        assert all(value.dtype == torch.float32 for value in tensors.values())
        forms.add((base.ndim, "lokr_w2" in tensors))
    assert not held
    assert item.ok, item.checks
    assert item.largest_error is not None
    assert item.largest_error <= 1e-6
    if kind == "lokr":
        assert {whole for _, whole in forms} == {True, False}
    prediction = trained_prediction(family)
    checked = with_prediction(item, Lycoris(), prediction, bench_of(tiny_bases[name]))
    assert checked.ok, checked.checks
    assert [check.name for check in checked.checks] == ["weights", "prediction"]
    clean = load_family(str(tiny_bases[name]))
    open_native(Lycoris(), item.path, clean)
    assert torch.allclose(probe_trained(clean), prediction, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "settings", "numbers"),
    [
        ("dora", {"rank": 4, "alpha": 4, "rank_stabilised": True}, ("4", "8.0")),  # alpha / sqrt(4) is 8 / 4
        ("dora", {"rank": 4}, ("4", "4.0")),
        ("loha", {"rank": 4, "alpha": 2}, ("4", "2.0")),
        ("lokr", {"rank": 3, "alpha": 6, "factor": 2}, ("3", "6.0")),
        ("lokr", {"rank": 1000, "alpha": 6}, (None, None)),  # whole matrices alone
    ],
)
def test_the_header_says_what_the_tensors_hold(
    kind: str, settings: dict[str, Any], numbers: tuple[str | None, str | None], tiny_bases: dict[str, Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    method, family = attached(tiny_bases["sd1"], kind, parts=["denoiser"], **settings)
    item = export_native(Lycoris(), method, family, Request(tmp_path, "x", "fp16", ABOUT))
    with safe_open(item.path, "pt") as opened:
        about = opened.metadata()
    assert (about.get("ss_network_dim"), about.get("ss_network_alpha")) == numbers
    content = item.path.read_bytes()
    whole = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    assert (about["sshs_model_hash"], about["modelspec.hash_sha256"]) == (whole, f"0x{whole}")


def test_names_are_those_that_uis_know(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    places = {name: set(held_in(written(name, "loha", tiny_bases[name], tmp_path)[2].path)) for name in NAMES}
    block = "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    layer = "text_model_encoder_layers_0_self_attn_q_proj"
    assert {f"lora_unet_{block}", f"lora_te_{layer}"} <= places["sd1"] & places["sd2"]
    assert {f"lora_te1_{layer}", f"lora_te2_{layer}"} <= places["sdxl"]
    assert {"lycoris_transformer_blocks_0_attn_to_q", f"lora_te1_{layer}"} <= places["flux"] & places["sd3"]
    assert "lycoris_single_transformer_blocks_0_proj_mlp" in places["flux"]
    for name, found in places.items():
        assert all(place.startswith(("lora_", "lycoris_")) for place in found), name


def test_the_magnitude_of_peft_would_be_read_wrong(tiny_bases: dict[str, Path]) -> None:
    """What the correction is for: PEFT's own magnitude, read as ComfyUI reads it, is another weight."""
    method, family = attached(tiny_bases["sd1"], "dora", rank=3, alpha=6)
    for _, path, layer in method.layers(family):
        base, tensors = layer.get_base_layer().weight.detach(), method.native_tensors(layer)
        wanted = base.double() + method.delta(layer).detach().double()
        assert relative(weight_of(tensors, base), wanted) < 1e-6, path
        tensors["dora_scale"] = layer.lora_magnitude_vector["default"].weight.detach().view_as(tensors["dora_scale"])
        assert relative(weight_of(tensors, base), wanted) > 1e-3, path


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_lycoris_itself_reads_the_same_change(kind: str, tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """The package lycoris-lora, where it is installed. Its DoRA divides by the norm of W + B A, unlike the UIs.

    4.1.3 needs an alpha even where it ignores it, and its `get_diff_weight` applies the scale twice.
    """
    lycoris = pytest.importorskip("lycoris.modules")
    method, family, item = written("sd1", kind, tiny_bases["sd1"], tmp_path)
    tensors, names = load_file(item.path), module_names(tiny_bases["sd1"])
    for part, path, layer in method.layers(family):
        tensors.setdefault(f"{names[part, path]}.alpha", torch.tensor(1.0))
        form, params = lycoris.get_module(tensors, names[part, path])
        theirs = lycoris.make_module(form, params, "x", layer.get_base_layer())
        found = theirs.get_weight(layer.get_base_layer().weight.shape).detach()
        assert relative(found, method.delta(layer).detach()) < 1e-6, path


@pytest.mark.parametrize("fault", ["a dropped module", "another value", "swapped modules", "a module too many"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_spoilt_file_is_found(
    kind: str, fault: str, tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        first = next(key for key in tensors if "attn1_to_q." in key).split(".")[0]
        mark = {"dora": "lora_up.weight", "loha": "hada_w1_a", "lokr": "lokr_w1"}[kind]
        one, other = f"{first}.{mark}", f"{first.replace('to_q', 'to_k')}.{mark}"
        if fault == "a dropped module":
            tensors = {key: value for key, value in tensors.items() if not key.startswith(f"{first}.")}
        elif fault == "another value":
            tensors[one] = tensors[one] + 0.5
        elif fault == "swapped modules":
            assert one != other
            tensors[one], tensors[other] = tensors[other], tensors[one]
        else:
            tensors["lora_unet_nothing.lokr_w1"] = torch.ones(1)
        save_file(tensors, path, metadata)

    monkeypatch.setattr(module, "save_tensors", spoilt)
    item = written("sd1", kind, tiny_bases["sd1"], tmp_path)[2]
    assert not item.ok
    assert item.read_by == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_base_in_low_precision(kind: str, dtype: torch.dtype, tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """As on a GPU: the file is exact on the rounded base."""
    from test_svd import attached_in

    method, family = attached_in(tiny_bases["sd1"], kind, dtype)
    bench = bench_of(tiny_bases["sd1"], dtype)
    item = export_native(Lycoris(), method, family, Request(tmp_path, "x", "fp16", ABOUT))
    item = with_prediction(item, Lycoris(), trained_prediction(family), bench)
    assert item.ok, item.checks
    assert "moves a prediction by" in item.checks[1].message


def test_formats_of_each_method() -> None:
    for kind in KINDS:
        assert formats_for(METHODS[kind].artifacts, usual=True) == ["diffusers", "kohya", "peft", "lycoris"]
    for kind in ("lora", "oft", "full", "textual_inversion"):
        with pytest.raises(BadInput, match=r"holds DoRA, LoHa and LoKr, .* not train: use (diffusers|folder|emb)"):
            check_formats(["lycoris"], METHODS[kind].artifacts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_a_whole_run_leaves_in_its_own_form(
    kind: str, tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(tiny_bases["sd1"], photos, kind, "export.max_error=1")
    path = job.train(recipe, tmp_path / "run")
    listed = {item["format"]: item for item in json.loads((path / "exports.json").read_text())}
    assert list(listed) == ["diffusers", "kohya", "peft", "lycoris"]
    assert all(check.startswith("ok: ") for check in listed["lycoris"]["checks"])
    with safe_open(path / "exports" / "mine-lycoris.safetensors", "pt") as opened:
        about = opened.metadata()
    assert about["ss_network_module"] == "lycoris.kohya"
    assert json.loads(about["ss_network_args"])["algo"] == {"dora": "lora"}.get(kind, kind)
    assert about["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert run(["export", str(path), "--to", "lycoris"]) == (0, "")
    assert "mine-lycoris.safetensors" in (path / "exports" / "README.md").read_text()
    wanted = probe_trained(open_result(path)[0])
    only = [Exported("lycoris", path / "exports" / "mine-lycoris.safetensors", 1, 1, 0.0, [])]
    shown = open_exported(RunFolder(path), only, torch.float32)
    assert shown is not None
    assert torch.allclose(probe_trained(shown), wanted, atol=1e-5)
