"""Extra inputs: predictions against diffusers' own pipelines, and a widened base against the base."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from finetune.core.batch import Geometry
from finetune.core.errors import BadInput
from finetune.families.base import Family
from finetune.families.conditioning import KINDS, channels, inputs_kind
from finetune.families.drawing import ImageCondition
from finetune.families.registry import FAMILIES
from finetune.families.schedulers import make_scheduler
from finetune.families.source import load_family
from finetune.methods.full import Full
from finetune.methods.lora import LoRA
from finetune.sampling.draw import draw
from finetune.sampling.settings import Sampling

CASES = [(name, kind) for name, family in FAMILIES.items() for kind in getattr(family, "pipelines", {}) if kind]
every_case = pytest.mark.parametrize(("name", "kind"), CASES, ids=lambda value: value)
SQUARE = Geometry((32, 32), (0, 0), (32, 32))


def test_these_are_all() -> None:
    assert CASES == [
        ("sd1", "inpaint"), ("sd1", "depth"), ("sd1", "edit"), ("sd2", "inpaint"), ("sd2", "depth"), ("sd2", "edit"),
        ("sdxl", "inpaint"), ("sdxl", "edit"),
    ]  # fmt: skip


def predict(family: Family, noisy: torch.Tensor) -> torch.Tensor:
    cond = family.encode_prompts(["a photo of a zwx mug", "a mug"])
    return family.predict(noisy, torch.tensor([20, 700]), cond, [Geometry((40, 48), (0, 4), (32, 32))] * 2)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@every_case
def test_a_widened_base_is_the_base(name: str, kind: str, tiny_bases: dict[str, Path]) -> None:
    """Bit for bit, whatever the extra input is; and it is not deaf: a gradient comes to the new weights."""
    base, wide = (load_family(str(tiny_bases[name])) for _ in range(2))
    wide.widen(kind)
    noisy, extra = noise(2, 4, 16, 16), 10 * noise(2, channels(kind), 16, 16)
    with torch.no_grad():
        assert torch.equal(predict(wide, torch.cat([noisy, extra], 1)), predict(base, noisy))
        assert torch.equal(predict(wide, noisy), predict(base, noisy))
    trained = Full().attach(wide, 0)
    predict(wide, torch.cat([noisy, extra], 1)).square().mean().backward()
    assert trained["denoiser.conv_in.weight"].grad[:, 4:].abs().amin((0, 2, 3)).gt(0).all()


@every_case
def test_a_base_that_has_them_is_recognised(name: str, kind: str, wide_bases: dict, tiny_bases: dict) -> None:
    family = load_family(str(wide_bases[name, kind]))
    assert (family.name, family.inputs, family.widened) == (name, kind, False)
    assert load_family(str(tiny_bases[name])).inputs is None
    family.widen(kind)  # it has them: nothing is done
    assert not family.widened
    other = next(other for other in KINDS if other != kind)
    with pytest.raises(BadInput, match=f"base reads '{kind}'"):
        family.widen(other)


@pytest.mark.parametrize(("name", "kind"), [("sdxl", "depth"), ("sdxl-refiner", "inpaint"), ("flux", "edit")])
def test_what_can_not_be_widened_says_so(name: str, kind: str, tiny_bases: dict[str, Path]) -> None:
    with pytest.raises(BadInput, match=f"base.inputs is '{kind}'"):
        load_family(str(tiny_bases[name])).widen(kind)


def test_published_channel_counts() -> None:
    """SD inpainting 9, SD2 depth 5, InstructPix2Pix 8, as their config.json say; the x4 upscaler's 7 is another."""
    kinds = [inputs_kind({"in_channels": count, "out_channels": 4}) for count in (4, 9, 5, 8, 7)]
    assert kinds == ["", "inpaint", "depth", "edit", None]
    assert inputs_kind({}) == ""


@pytest.mark.parametrize("kind", ["depth", "edit"])
def test_a_base_of_11_latent_channels_is_widened_by_its_own_number(kind: str, tmp_path: Path) -> None:
    """The tiny base has 11: no published base tells that these counts follow from the latents."""
    family = load_family("tiny")
    before = draw(family, ["a mug"], Sampling(steps=2, size=32, guidance=1.0), seeds=[1])[0]
    family.widen(kind)
    assert family.parts["denoiser"].conv_in.in_channels == {"depth": 12, "edit": 22}[kind]
    given = ImageCondition(torch.rand(3, 32, 32), torch.rand(1, 32, 32))
    image = draw(family, ["a mug"], Sampling(steps=2, size=32, guidance=1.0), seeds=[1], condition=given)[0]
    if kind == "edit":  # the depth pipeline starts from grey latents under noise
        assert np.array_equal(np.asarray(image), np.asarray(before))
    family.drawing.pipeline().save_pretrained(tmp_path)
    assert load_family(str(tmp_path)).inputs == kind


def test_diffusers_paints_with_4_latent_channels_alone() -> None:
    with pytest.raises(BadInput, match="has 11 latent channels"):
        load_family("tiny").widen("inpaint")


def given_of(kind: str) -> ImageCondition:
    made = torch.Generator().manual_seed(7)
    image, depth = torch.rand(3, 32, 32, generator=made), torch.rand(1, 32, 32, generator=made)
    mask = torch.zeros(1, 32, 32)
    mask[:, 8:24, 4:20] = 1
    return ImageCondition(image, {"inpaint": mask, "depth": depth}.get(kind), 1.0)


def extra_of(family: Family, given: ImageCondition) -> torch.Tensor:
    """The extra input written out here, with diffusers' VAE."""
    vae = family.parts["vae"]
    pixels = 2 * given.image[None] - 1
    if family.inputs == "depth":
        small = interpolate(given.beside[None], (16, 16), mode="bicubic", align_corners=False)
        return 2 * (small - small.min()) / (small.max() - small.min()) - 1
    if family.inputs == "edit":
        return vae.encode(pixels).latent_dist.mode()
    masked = vae.encode(pixels * (1 - given.beside)).latent_dist.mode() * vae.config.scaling_factor
    return torch.cat([interpolate(given.beside[None], (16, 16)), masked], 1)


@every_case
@torch.no_grad()
def test_our_prediction_draws_the_pipelines_picture(
    name: str, kind: str, wide_bases: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One DDIM step written out here equals the pipeline's, from the same noise (and the VAE's mean)."""
    monkeypatch.setattr(
        diffusers.models.autoencoders.vae.DiagonalGaussianDistribution,
        "sample",
        lambda self, generator=None: self.mean,
    )
    family = load_family(str(wide_bases[name, kind]))
    given = given_of(kind)
    left_out = {"depth_estimator": None, "feature_extractor": None} if kind == "depth" else {}
    pipeline = getattr(diffusers, family.pipelines[kind]).from_pretrained(wide_bases[name, kind], **left_out)
    pipeline.scheduler = make_scheduler(family.drawing.scheduler, "ddim")
    start = noise(1, 4, 16, 16)
    latents = {} if kind == "depth" else {"latents": start}
    if kind == "depth":  # it starts from the picture under noise: grey here
        grey = family.codec.encode(torch.zeros(1, 3, 32, 32)).mean
        drawn = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
        pipeline.scheduler.set_timesteps(1)
        start = pipeline.scheduler.add_noise(grey, drawn, pipeline.scheduler.timesteps)
    theirs = pipeline(
        "a mug",
        num_inference_steps=1,
        guidance_scale=1.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(5),
        **latents,
        **family.drawing.inputs(32, 1, 1, given),
    ).images
    scheduler = make_scheduler(family.drawing.scheduler, "ddim")
    scheduler.set_timesteps(1)
    noisy = torch.cat([start, extra_of(family, given)], 1)
    predicted = family.predict(noisy, scheduler.timesteps, family.encode_prompts(["a mug"]), [SQUARE])
    ours = scheduler.step(predicted, scheduler.timesteps[0], start).prev_sample
    assert torch.allclose(ours, theirs, atol=1e-4), (ours - theirs).abs().max()
    blind = family.predict(start, scheduler.timesteps, family.encode_prompts(["a mug"]), [SQUARE])
    assert not torch.allclose(blind, predicted, atol=1e-2)  # the extra input matters here


@every_case
def test_pictures_are_drawn_from_what_is_given(name: str, kind: str, wide_bases: dict) -> None:
    family = load_family(str(wide_bases[name, kind]))
    settings = Sampling(steps=2, guidance=3.0)
    together = draw(family, ["a mug", "a dog"], settings, seeds=[1, 2], condition=given_of(kind))
    alone = draw(family, ["a dog"], settings, seeds=[2], condition=given_of(kind))
    without = draw(family, ["a dog"], settings, seeds=[2])
    first, second = np.asarray(together[1], dtype=int), np.asarray(alone[0], dtype=int)
    assert first.shape == (32, 32, 3)
    assert np.abs(first - second).max() <= 1
    assert np.abs(second - np.asarray(without[0], dtype=int)).max() > 1


@every_case
def test_a_lora_on_a_base_that_has_them_moves_nothing_else(name: str, kind: str, wide_bases: dict) -> None:
    family = load_family(str(wide_bases[name, kind]))
    noisy = noise(2, 4 + channels(kind), 16, 16)
    before = predict(family, noisy)
    weights = {n: p.detach().clone() for n, p in family.parts["denoiser"].named_parameters()}
    trained = LoRA(rank=2).attach(family, 0)
    assert torch.equal(predict(family, noisy), before)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for _ in range(2):
        predict(family, noisy).square().mean().backward()
        optimizer.step()
    held = dict(family.parts["denoiser"].named_parameters())
    for n, value in weights.items():
        same = (
            held[n]
            if n in held
            else held[n.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")]
        )
        assert torch.equal(same, value), n
    assert not torch.equal(predict(family, noisy), before)


def test_a_released_widened_denoiser_comes_back_wide(tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases["sd1"]))
    family.widen("edit")
    family.parts.release(["denoiser"])
    family.parts.restore(["denoiser"])
    assert family.parts["denoiser"].conv_in.in_channels == 8


def test_what_is_told_of_a_base(wide_bases: dict) -> None:
    from finetune.families.facts import facts

    assert facts(wide_bases["sd2", "depth"])["family"] == "sd2 (StableDiffusionDepth2ImgPipeline)"
    index = json.loads((wide_bases["sdxl", "inpaint"] / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLInpaintPipeline"
