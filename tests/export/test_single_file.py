"""Single-file checkpoints: there and back bit for bit, and diffusers' own reader as the independent one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune import load_recipe, train
from finetune.cli.main import run
from finetune.core.errors import BadInput
from finetune.export.base import Request
from finetune.export.model.checkpoint_file import export_checkpoint
from finetune.export.registry import EXPORTS
from finetune.families.base import Family
from finetune.families.naming.clip import strip_text_model
from finetune.families.registry import FAMILIES
from finetune.families.source import load_family, resolve_base

NAMES = [name for name, family in FAMILIES.items() if family.naming.single_file is not None]
ABOUT = {"title": "x", "trigger_phrase": "zwx mug", "resolution": "32x32"}


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def file_of(base: Path, path: Path, dtype: str = "fp32") -> Path:
    item = export_checkpoint(load_family(str(base)), path, dtype, ABOUT)
    assert item.ok, item.checks
    return path


def weights(family: Family) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{strip_text_model(key)}": value
        for part, module in family.parts.items()
        for key, value in module.state_dict().items()
        if not key.endswith("position_ids")
    }


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_folder_to_file_to_folder(name: str, dtype: str, tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    base = tiny_bases[name]
    file = file_of(base, tmp_path / "x.safetensors", dtype)
    stored = {"fp32": torch.float32, "fp16": torch.float16}[dtype]
    wanted, found = weights(load_family(str(base))), weights(load_family(str(file), like=str(base)))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(value.to(stored).float(), found[key].float()) for key, value in wanted.items())
    folder = resolve_base(str(file), like=str(base))
    assert {value.dtype for value in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").values()} == {
        stored
    }
    again = export_checkpoint(load_family(str(folder)), tmp_path / "again.safetensors", dtype, ABOUT)
    assert again.ok
    first, second = load_file(file), load_file(again.path)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_diffusers_reads_the_file_as_the_folder(name: str, tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """from_single_file, with the folder as its local config: every weight, and the same picture."""
    base = tiny_bases[name]
    file = file_of(base, tmp_path / "x.safetensors")
    kind = getattr(diffusers, FAMILIES[name].pipeline_class)
    pipeline = kind.from_single_file(str(file), config=str(base), local_files_only=True, torch_dtype=torch.float32)
    ours = load_family(str(base))
    theirs = {"denoiser": pipeline.unet, "vae": pipeline.vae, "text_encoder": pipeline.text_encoder}
    if name == "sdxl":
        theirs["text_encoder_2"] = pipeline.text_encoder_2
    for part, module in theirs.items():
        wanted = {strip_text_model(key): value for key, value in ours.parts[part].state_dict().items()}
        found = {strip_text_model(key): value for key, value in module.state_dict().items()}
        for key, value in wanted.items():
            if not key.endswith("position_ids"):
                assert torch.equal(found[key], value), f"{part}.{key}"


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_there_is_no_single_file_of_a_transformer(name: str, tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="use --to folder"):
        export_checkpoint(load_family(str(tiny_bases[name])), tmp_path / "x.safetensors", "fp16", ABOUT)
    assert list(tmp_path.iterdir()) == []


def test_layout_is_the_original_one(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """Names that the UIs look for, as they stand in published files."""
    seen = {name: load_file(file_of(tiny_bases[name], tmp_path / f"{name}.safetensors")) for name in NAMES}
    for tensors in seen.values():
        assert "model.diffusion_model.input_blocks.0.0.weight" in tensors
        assert "model.diffusion_model.time_embed.2.bias" in tensors
        assert tensors["first_stage_model.decoder.mid.attn_1.q.weight"].ndim == 4
        assert "first_stage_model.encoder.down.0.block.0.norm1.weight" in tensors
    assert "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight" in seen["sd1"]
    fused = seen["sd2"]["cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"]
    assert fused.shape[0] == 3 * fused.shape[1]
    assert "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight" in seen["sdxl"]
    assert "conditioner.embedders.1.model.text_projection" in seen["sdxl"]
    assert "model.diffusion_model.label_emb.0.0.weight" in seen["sdxl"]
    with safe_open(tmp_path / "sdxl.safetensors", "pt") as opened:
        assert opened.metadata()["modelspec.architecture"] == "stable-diffusion-xl-v1-base"


def test_a_run_on_a_file_is_the_run_on_its_folder(tiny_bases: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    file = file_of(tiny_bases["sd1"], tmp_path / "x.safetensors")
    settings = [f"data.photos={photos}", "data.class_noun=mug", "prior.kind=none", "run.steps=2", "sample.steps=1",
                "sample.count=1", "sample.prompts=['a {noun}']"]  # fmt: skip
    ends = []
    for number, base in enumerate(([f"base={tiny_bases['sd1']}"], [f"base={file}", f"base.like={tiny_bases['sd1']}"])):
        done = train(
            load_recipe("dreambooth-full", [*settings, *base, "export.formats=[checkpoint]"]), tmp_path / str(number)
        )
        ends.append(load_file(done / "adapter" / "trained.safetensors"))
        assert (done / "exports" / "dreambooth-full.safetensors").is_file()
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
    assert run(["export", str(tmp_path / "1"), "--to", "checkpoint", "--to", "folder"]) == (0, "")


def spoilt(file: Path, change: object) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def rename(tensors: dict[str, torch.Tensor], old: str, new: str) -> None:
    for key in list(tensors):
        tensors[key.replace(old, new)] = tensors.pop(key)


INPUT = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(INPUT), "no UNet in the original layout"),
        (lambda t: t.__setitem__(INPUT, torch.ones(8, 9, 3, 3)), "9 input channels (inpainting)"),
        (lambda t: [t.pop(k) for k in list(t) if k.startswith("cond_stage")], "no known text encoder"),
        (lambda t: t.pop("first_stage_model.quant_conv.weight"), "has no first_stage_model.quant_conv.weight"),
        (lambda t: t.__setitem__("model.diffusion_model.out.2.weight", torch.ones(4, 3, 3, 3)), "choose a folder"),
        (
            lambda t: rename(t, "cond_stage_model.transformer", "conditioner.embedders.0.model"),
            "refiner",
        ),
    ],
)  # fmt: skip
def test_files_that_are_something_else(
    change: object, words: str, tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    file = file_of(tiny_bases["sd1"], tmp_path / "x.safetensors")
    spoilt(file, change)
    arguments = [f"base={file}", f"base.like={tiny_bases['sd1']}", f"data.photos={photos}", "data.class_noun=mug"]
    code, message = run(["train", "dreambooth-lora", *arguments, "--dry-run"])
    assert code == 2
    assert words in message
    assert "\n" not in message


def test_a_like_of_another_family_and_a_truncated_file(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    file = file_of(tiny_bases["sd1"], tmp_path / "x.safetensors")
    with pytest.raises(BadInput, match=r"is of family sd1 but base\.like=.* is of family sdxl"):
        load_family(str(file), like=str(tiny_bases["sdxl"]))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(BadInput, match="not a complete safetensors file"):
        load_family(str(file), like=str(tiny_bases["sd1"]))


def test_ema_copies_and_other_left_overs_do_not_matter(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    file = file_of(tiny_bases["sd1"], tmp_path / "x.safetensors")
    odd = {"model_ema.decay": torch.ones(1), "betas": torch.ones(1000), "cond_stage_model.logit_scale": torch.ones(1)}
    save_file(load_file(file) | odd, file)
    assert load_family(str(file), like=str(tiny_bases["sd1"])).name == "sd1"


@pytest.mark.parametrize(
    ("scheduler", "wanted"),
    [
        ({}, []),
        ({"rescale_betas_zero_snr": True}, []),
        ({"prediction_type": "v_prediction"}, ["v_pred"]),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, ["v_pred", "ztsnr"]),
    ],
)
def test_an_sdxl_file_says_what_it_predicts(
    scheduler: dict, wanted: list[str], tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    """By the empty tensors of NoobAI's files. A base with another scheduler as `like` is then no obstacle: the file
    decides. diffusers does not look at them, but reads the file."""
    base = tmp_path / "base"
    shutil.copytree(tiny_bases["sdxl"], base)
    config = base / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | scheduler))
    file = file_of(base, tmp_path / "x.safetensors")
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["modelspec.prediction_type"] == ("v" if wanted else "epsilon")
        marks = {key: opened.get_tensor(key) for key in opened.keys() if "." not in key}  # noqa: SIM118
    assert sorted(marks) == wanted
    assert all(value.shape == (0,) for value in marks.values())
    ours = load_family(str(file), like=str(tiny_bases["sdxl"])).schedule
    if wanted:
        assert ours.prediction == "v_prediction"
        assert torch.equal(ours.alphas_cumprod, load_family(str(base)).schedule.alphas_cumprod)
        assert (float(ours.alphas_cumprod[-1]) == 0) == ("ztsnr" in wanted)
    kind = diffusers.StableDiffusionXLPipeline
    theirs = kind.from_single_file(str(file), config=str(base), local_files_only=True)
    assert theirs.scheduler.config.prediction_type == scheduler.get("prediction_type", "epsilon")
    blind = kind.from_single_file(str(file), config=str(tiny_bases["sdxl"]), local_files_only=True)
    assert blind.scheduler.config.prediction_type == "epsilon"


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_other_families_need_no_marks(name: str, tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """SD2 predicts v; UIs know it by its weights. A file that has the mark is read by it."""
    file = file_of(tiny_bases[name], tmp_path / "x.safetensors")
    assert "v_pred" not in load_file(file)
    spoilt(file, lambda tensors: tensors.__setitem__("v_pred", torch.zeros(1)))
    assert load_family(str(file), like=str(tiny_bases[name])).schedule.prediction == "v_prediction"


def test_a_changed_folder_of_configs_is_read_again(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """The converted folder was known by the path of `like`: a corrected scheduler had no effect."""
    like = tmp_path / "like"
    shutil.copytree(tiny_bases["sd1"], like)
    file = file_of(like, tmp_path / "x.safetensors")
    first = resolve_base(str(file), like=str(like))
    written = (first / "unet" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    assert resolve_base(str(file), like=str(like)) == first
    assert (first / "unet" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns == written
    config = like / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "sample"}))
    assert load_family(str(file), like=str(like)).schedule.prediction == "sample"


def test_the_header_counts_where_nobody_chose_the_configs(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tuned SD2 of 512 pixels, which predicts noise, was read as the usual SD2, which predicts v."""
    base, usual = tmp_path / "base", tiny_bases["sd2"]
    shutil.copytree(usual, base)
    config = base / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "epsilon"}))
    file = file_of(base, tmp_path / "x.safetensors")
    assert load_family(str(usual)).schedule.prediction == "v_prediction"
    monkeypatch.setattr("finetune.families.source._download", lambda *given, **more: usual)
    assert load_family(str(file)).schedule.prediction == "epsilon"
    assert load_family(str(file), like=str(usual)).schedule.prediction == "v_prediction"  # the person's own choice


@pytest.mark.parametrize("form", ["checkpoint", "folder"])
def test_a_weight_that_overflows_fp16_is_told(form: str, tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """Infinity is equal to infinity: the check said "bit for bit", and every image of the model was black."""
    family = load_family(str(tiny_bases["sd1"]))
    with torch.no_grad():
        next(iter(family.parts["denoiser"].parameters())).flatten()[0] = 1e6
    request = Request(tmp_path, "x", "fp16", ABOUT)
    for verify in ("full", "deltas"):
        item = EXPORTS[form]().export(family, EXPORTS[form]().path(tmp_path, "x", "sd1"), request, verify)
        assert not item.ok
        assert "that fp16 can't hold: export with export.dtype=fp32" in item.checks[0].line
