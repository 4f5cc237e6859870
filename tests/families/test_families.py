"""Families against diffusers' own pipelines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch

from finetune.core.batch import Geometry
from finetune.core.errors import BadInput
from finetune.families.digests import base_hash
from finetune.families.flux import image_ids, pack_latents, unpack_latents
from finetune.families.registry import FAMILIES
from finetune.families.schedulers import SAMPLERS, make_scheduler
from finetune.families.sd import StableDiffusion1
from finetune.families.source import load_family

NAMES = list(FAMILIES)
PROMPTS = ["a photo of a zwx mug", ""]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_is_recognised_and_frozen(name: str, tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases[name]))
    assert family.name == name
    flows = {"sd2": "v_prediction", "sd3": "flow_prediction", "flux": "flow_prediction"}
    assert family.schedule.prediction == flows.get(name, "epsilon")
    assert (family.resolution, family.codec.factor) == (32, 2)
    for part in family.parts.values():
        assert not part.training
        assert not any(parameter.requires_grad for parameter in part.parameters())


class LastButOne(StableDiffusion1):
    """A variation as another package may add it, named so that it comes behind the family that it varies."""

    name = "sd1-variation"

    @classmethod
    def matches(cls, model_index: dict, denoiser_config: dict) -> bool:
        return super().matches(model_index, denoiser_config) and "_variation" in model_index


def test_a_variation_goes_before_the_family_that_it_varies(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES._found, LastButOne.name, LastButOne)
    shutil.copytree(tiny_bases["sd1"], tmp_path / "base")
    file = tmp_path / "base" / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_variation": True}))
    assert load_family(str(tmp_path / "base")).name == "sd1-variation"
    assert load_family(str(tiny_bases["sd1"])).name == "sd1"


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_sd_prompts_equal_the_pipelines(name: str, tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases[name]))
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tiny_bases[name])
    theirs, _ = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)
    assert torch.equal(family.encode_prompts(PROMPTS)["hidden"], theirs)


def test_sdxl_prompts_equal_the_pipelines(tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases["sdxl"]))
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(tiny_bases["sdxl"], add_watermarker=False)
    hidden, _, pooled, _ = pipeline.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False)
    ours = family.encode_prompts(PROMPTS)
    assert torch.equal(ours["hidden"], hidden)
    assert torch.equal(ours["pooled"], pooled)


@pytest.mark.parametrize("without", [[], ["text_encoder_3"]], ids=["t5", "no-t5"])
def test_sd3_prompts_equal_the_pipelines(without: list, tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases["sd3"]), without=without)
    left_out = {"text_encoder_3": None, "tokenizer_3": None} if without else {}
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(tiny_bases["sd3"], **left_out)
    length = family.drawing.arguments(1.0, [])["max_sequence_length"]
    asked = {"do_classifier_free_guidance": False, "max_sequence_length": length}
    hidden, _, pooled, _ = pipeline.encode_prompt(PROMPTS, PROMPTS, PROMPTS, **asked)
    ours = family.encode_prompts(PROMPTS)
    assert torch.allclose(ours["hidden"], hidden, atol=1e-5)
    assert torch.equal(ours["pooled"], pooled)


def test_flux_prompts_equal_the_pipelines(tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases["flux"]))
    pipeline = diffusers.FluxPipeline.from_pretrained(tiny_bases["flux"])
    hidden, pooled, _ = pipeline.encode_prompt(PROMPTS, PROMPTS, max_sequence_length=16)
    ours = family.encode_prompts(PROMPTS)
    assert torch.allclose(ours["hidden"], hidden, atol=1e-5)
    assert torch.equal(ours["pooled"], pooled)


def test_flux_packs_as_the_pipeline_does() -> None:
    latents = torch.randn(2, 16, 8, 12)
    packed = diffusers.FluxPipeline._pack_latents(latents, 2, 16, 8, 12)
    assert torch.equal(pack_latents(latents), packed)
    assert torch.equal(unpack_latents(packed, 4, 6), latents)
    assert torch.equal(
        image_ids(4, 6), diffusers.FluxPipeline._prepare_latent_image_ids(2, 4, 6, "cpu", torch.float32)
    )


def test_a_dropped_encoder_is_zeros_and_the_others_stay(tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases["sdxl"]))
    whole = family.encode_prompts(PROMPTS)
    some = family.encode_prompts(PROMPTS, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    width = family.parts["text_encoder"].config.hidden_size
    assert not some["hidden"][0, :, :width].any()
    assert not some["pooled"][1].any()
    assert torch.equal(some["hidden"][0, :, width:], whole["hidden"][0, :, width:])
    assert torch.equal(some["hidden"][1, :, :width], whole["hidden"][1, :, :width])


def test_only_what_can_be_left_out_is(tiny_bases: dict[str, Path]) -> None:
    assert list(load_family(str(tiny_bases["sd3"]), without=["text_encoder_3"]).parts) == [
        "denoiser", "vae", "text_encoder", "text_encoder_2",
    ]  # fmt: skip
    with pytest.raises(BadInput, match="only text_encoder_3 can be left out"):
        load_family(str(tiny_bases["sd3"]), without=["vae"])
    with pytest.raises(BadInput, match="all of its parts are needed"):
        load_family(str(tiny_bases["sd1"]), without=["text_encoder"])


def test_refiner_prompts_and_time_ids_equal_the_pipelines(tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases["sdxl-refiner"]))
    pipeline = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(tiny_bases["sdxl-refiner"])
    hidden, _, pooled, _ = pipeline.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False)
    ours = family.encode_prompts(PROMPTS)
    assert torch.equal(ours["hidden"], hidden)
    assert torch.equal(ours["pooled"], pooled)
    sizes = ((40, 48), (3, 5), (32, 32))
    theirs, _ = pipeline._get_add_time_ids(*sizes, 6.0, 2.5, *sizes, torch.float32, 24)
    assert torch.equal(family._time_ids([Geometry(*sizes)]), theirs)


def test_sdxl_time_ids_equal_the_pipelines(tiny_bases: dict[str, Path]) -> None:
    from finetune.families.sdxl import time_ids

    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(tiny_bases["sdxl"], add_watermarker=False)
    theirs = pipeline._get_add_time_ids((40, 48), (3, 5), (32, 32), torch.float32, 24)
    assert torch.equal(time_ids([Geometry((40, 48), (3, 5), (32, 32))]), theirs)


@pytest.mark.parametrize("name", NAMES)
def test_latents_are_the_vaes_distribution_scaled(name: str, tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases[name]))
    vae = diffusers.AutoencoderKL.from_pretrained(tiny_bases[name], subfolder="vae")
    vae.enable_slicing()  # as a family holds it: two pictures at once differ in the last bits
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        theirs = vae.encode(pixels).latent_dist
    ours = family.codec.encode(pixels)
    offset = vae.config.shift_factor or 0.0
    assert torch.allclose(ours.mean, (theirs.mean - offset) * vae.config.scaling_factor, atol=1e-6)
    assert torch.allclose(ours.std, theirs.std * vae.config.scaling_factor)
    with torch.no_grad():
        assert torch.allclose(family.codec.decode(ours.mean), vae.decode(theirs.mean).sample, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_our_prediction_draws_the_pipelines_picture(name: str, tiny_bases: dict[str, Path]) -> None:
    """One step written out here with our predict equals the pipeline's: DDIM, or Euler for a flow."""
    family = load_family(str(tiny_bases[name]))
    sampler = "euler" if family.schedule.prediction == "flow_prediction" else "ddim"
    pipeline = family.drawing.pipeline(sampler)
    noise = torch.randn(1, family.codec.channels, 16, 16, generator=torch.Generator().manual_seed(1))
    arguments = family.drawing.arguments(1.0, [""]) | {"negative_prompt": None}
    given = pack_latents(noise) if name == "flux" else noise
    arguments |= family.drawing.inputs(32, 1, 1, None)
    theirs = pipeline(PROMPTS[0], num_inference_steps=1, latents=given, output_type="latent", **arguments).images
    theirs = unpack_latents(theirs, 8, 8) if name == "flux" else theirs
    scheduler = make_scheduler(family.drawing.scheduler, sampler)
    scheduler.set_timesteps(1, **({"mu": 1.0} if name == "flux" else {}))
    t = scheduler.timesteps
    with torch.no_grad():
        square = Geometry((32, 32), (0, 0), (32, 32))
        predicted = family.predict(noise, t, family.encode_prompts(PROMPTS[:1]), [square])
    assert torch.allclose(scheduler.step(predicted, t[0], noise).prev_sample, theirs, atol=1e-5)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_samplers_keep_the_bases_schedule(sampler: str, tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases["sd2"]))
    made = make_scheduler(family.drawing.scheduler, sampler)
    assert made.config.prediction_type == "v_prediction"
    assert torch.allclose(made.alphas_cumprod, family.schedule.alphas_cumprod)


def test_an_unknown_sampler_names_the_nearest(tiny_bases: dict[str, Path]) -> None:
    with pytest.raises(BadInput, match="did you mean 'euler'"):
        load_family(str(tiny_bases["sd1"])).drawing.pipeline("eular")


def test_long_prompts_say_what_is_cut(tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases["sd1"]))
    with pytest.warns(UserWarning, match="snow"):
        family.encode_prompts(["a photo of a dog " * 4 + "snow"])


def test_released_parts_come_back_the_same(tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases["sd1"]))
    before = {name: value.clone() for name, value in family.parts["vae"].state_dict().items()}
    family.parts.release(["vae", "text_encoder"])
    assert sum(p.numel() for p in family.parts["vae"].parameters()) == 0
    family.parts.restore(["vae", "text_encoder"])
    assert all(torch.equal(value, before[name]) for name, value in family.parts["vae"].state_dict().items())


def test_base_hash_is_of_the_content(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bases["sd1"], copy)
    assert base_hash(copy) == base_hash(tiny_bases["sd1"]) != base_hash(tiny_bases["sd2"])
    config = copy / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("epsilon", "v_prediction"))
    assert base_hash(copy) != base_hash(tiny_bases["sd1"])


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda f: shutil.rmtree(f / "vae"), "vae"),
        (lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "unet"),
        (lambda f: (f / "tokenizer" / "tokenizer.json").unlink() or shutil.rmtree(f / "tokenizer"), "tokenizer"),
        (lambda f: (f / "model_index.json").unlink(), "model_index"),
        (lambda f: (f / "scheduler" / "scheduler_config.json").unlink(), "scheduler"),
    ],
)
def test_a_broken_folder_gets_one_sentence(fault, said: str, tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_bases["sd1"], folder)
    fault(folder)
    with pytest.raises(BadInput, match=said) as caught:
        load_family(str(folder))
    assert "\n" not in str(caught.value)


def test_strange_sources(tmp_path: Path, tiny_bases: dict[str, Path]) -> None:
    with pytest.raises(BadInput, match="is not a folder"):
        load_family("nowhere")
    with pytest.raises(BadInput, match="hub"):
        load_family("nobody/nothing-of-this-name")
    folder = tmp_path / "base"
    shutil.copytree(tiny_bases["sd1"], folder)
    index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": "KandinskyPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(BadInput, match="KandinskyPipeline"):
        load_family(str(folder))
