"""Sampling: seeds, the grid, and what a PNG says of itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from finetune.core.errors import BadInput
from finetune.families.base import Family
from finetune.families.drawing import ImageCondition
from finetune.families.registry import FAMILIES
from finetune.families.schedulers import SAMPLERS
from finetune.families.source import load_family
from finetune.sampling.draw import draw
from finetune.sampling.images import A1111_SAMPLERS, grid, parameters, save_image
from finetune.sampling.settings import Sampling


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_picture_is_a_function_of_prompt_and_seed(name: str, tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases[name]))
    settings = Sampling(steps=2, guidance=3.0)
    together = draw(family, ["a mug", "a dog", "a mug"], settings, seeds=[1, 1, 2])
    alone = draw(family, ["a dog"], settings, seeds=[1])
    first, second, third = (np.asarray(image, dtype=int) for image in together)
    assert first.shape == (32, 32, 3)
    assert np.abs(second - np.asarray(alone[0], dtype=int)).max() <= 1
    assert np.abs(first - third).max() > 1


def test_guidance_1_is_no_guidance(tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases["sd1"]))
    plain, negative = (
        draw(family, ["a mug"], Sampling(steps=2, guidance=1.0, negative=text), seeds=[1])[0] for text in ("", "a dog")
    )
    assert np.array_equal(np.asarray(plain), np.asarray(negative))


def test_drawing_leaves_the_modes_as_they_were(tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases["sd1"]))
    family.parts["denoiser"].train()
    draw(family, ["a mug"], Sampling(steps=1), seeds=[1])
    assert family.parts["denoiser"].training
    assert not family.parts["vae"].training


def test_the_grid_and_the_parameters(tmp_path: Path) -> None:
    images = [Image.new("RGB", (8, 6), (k, 0, 0)) for k in range(5)]
    page = grid(images, 2)
    assert page.size == (16, 18)
    assert page.getpixel((12, 8)) == (3, 0, 0)
    text = parameters("a mug", 7, Sampling("blurry", "dpm++", 20, 5.0, 64), "tiny")
    save_image(images[0], tmp_path / "a" / "b.png", text)
    with Image.open(tmp_path / "a" / "b.png") as image:
        assert image.text["parameters"] == text
    assert text.splitlines() == [
        "a mug",
        "Negative prompt: blurry",
        "Steps: 20, Sampler: DPM++ 2M, CFG scale: 5.0, Seed: 7, Size: 64x64, Model: tiny",
    ]


def test_every_sampler_has_the_name_that_other_programs_know() -> None:
    assert A1111_SAMPLERS.keys() == SAMPLERS.keys()


def test_a_model_name_with_a_comma_is_quoted_as_a1111_does() -> None:
    text = parameters("p", 1, Sampling("", "euler", 5, 1.0, 64), "a, b")
    assert text.splitlines() == [
        "p",
        'Steps: 5, Sampler: Euler, CFG scale: 1.0, Seed: 1, Size: 64x64, Model: "a, b"',
    ]


def test_captions_stand_above_their_rows() -> None:
    images = [Image.new("RGB", (60, 10), "red")] * 4
    page = np.asarray(grid(images, 2, ["first", "second"]))
    assert page.shape == (2 * (10 + 16), 120, 3)
    for top in (0, 26):
        assert (page[top : top + 16] < 100).all(axis=2).any(), "no black ink"
        assert (page[top + 16 : top + 26] == (255, 0, 0)).all()


def test_released_parts_come_back_in_eval_mode(tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases["sd1"]))
    whole = draw(family, ["a mug"], Sampling(steps=1), seeds=[1])
    family.parts.release(["vae", "text_encoder"])
    again = draw(family, ["a mug"], Sampling(steps=1), seeds=[1])
    assert not any(part.training for part in family.parts.values())
    assert np.array_equal(np.asarray(whole[0]), np.asarray(again[0]))


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_picture_is_what_diffusers_own_call_gives(name: str, tiny_bases: dict[str, Path]) -> None:
    """One at a time, from a pipeline that diffusers itself has loaded from the folder."""
    kind = getattr(diffusers, FAMILIES[name].pipeline_class)
    pipeline = kind.from_pretrained(tiny_bases[name], safety_checker=None, requires_safety_checker=False)
    flow = "FlowMatch" in type(pipeline.scheduler).__name__
    if not flow:
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(
            pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False
        )
    pipeline.set_progress_bar_config(disable=True)
    blank = {"image": torch.zeros(1, 4, 16, 16), "strength": 1.0}
    wanted = pipeline(
        "a mug",
        negative_prompt="blurry",
        **({"max_sequence_length": 16} if flow else {}),
        num_inference_steps=3,
        guidance_scale=4.0,
        **(blank if name == "sdxl-refiner" else {"width": 32, "height": 32}),
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    family = load_family(str(tiny_bases[name]))
    settings = Sampling("blurry", sampler="euler" if flow else "ddim", steps=3, guidance=4.0, size=32)
    got = draw(family, ["a dog", "a mug"], settings, seeds=[9, 5])[1]
    assert np.abs(np.asarray(got, dtype=int) - np.asarray(wanted, dtype=int)).max() <= 1


def test_a_refiner_refines_what_it_is_given(tiny_bases: dict[str, Path]) -> None:
    """As diffusers does by default: three tenths of the steps, and at least one."""
    pipeline = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(tiny_bases["sdxl-refiner"])
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False
    )
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(2))
    seed = torch.Generator().manual_seed(5)
    wanted = pipeline("a mug", image=image[None], num_inference_steps=10, guidance_scale=1.0, generator=seed)
    family = load_family(str(tiny_bases["sdxl-refiner"]))
    settings, given = Sampling(sampler="ddim", guidance=1.0, steps=10), ImageCondition(image)
    got = draw(family, ["a mug"], settings, seeds=[5], condition=given)[0]
    assert np.abs(np.asarray(got, dtype=int) - np.asarray(wanted.images[0], dtype=int)).max() <= 1
    assert draw(family, ["a mug"], replace(settings, steps=1), seeds=[5], condition=given)[0].size == (32, 32)


DTYPES = (torch.bfloat16, torch.float16)
INPUTS = [(name, kind) for name, family in FAMILIES.items() for kind in getattr(family, "pipelines", {"": ""})]


def drawn_in(dtype: torch.dtype, base: Path, inputs: str, force_upcast: bool) -> tuple[np.ndarray, Family]:
    """Two pictures as grey levels, and the family that drew them."""
    family = load_family(str(base), dtype=dtype)
    if inputs:
        family.widen(inputs)
    family.parts["vae"].register_to_config(force_upcast=force_upcast)
    images = draw(family, ["a mug", "a dog"], Sampling(steps=2, guidance=2.0), seeds=[1, 2])
    return np.stack([np.asarray(image, dtype=int) for image in images]), family


@pytest.fixture(scope="module")
def in_fp32(tiny_bases: dict[str, Path]) -> Callable[[str, str, bool], np.ndarray]:
    """The pictures that those in half precision are held to; drawn once."""
    return cache(lambda name, inputs, upcast: drawn_in(torch.float32, tiny_bases[name], inputs, upcast)[0])


@pytest.mark.parametrize("force_upcast", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "inputs"), INPUTS)
def test_half_precision_draws_the_same_picture(
    name: str,
    inputs: str,
    dtype: torch.dtype,
    force_upcast: bool,
    tiny_bases: dict[str, Path],
    in_fp32: Callable[[str, str, bool], np.ndarray],
) -> None:
    """Grey levels apart by no more than the dtype rounds to: 8 steps of eps over 255 levels. SDXL's VAE stays in fp32
    under fp16, whatever its config's `force_upcast` says, and drawing leaves it so."""
    wanted = in_fp32(name, inputs, force_upcast)
    found, family = drawn_in(dtype, tiny_bases[name], inputs, force_upcast)
    wide = name.startswith("sdxl") and dtype == torch.float16
    assert family.parts["vae"].dtype == (torch.float32 if wide else dtype)
    assert wanted.std() > 1
    assert np.abs(wanted - found).max() <= max(1, round(8 * torch.finfo(dtype).eps * 255))


@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_vae_decodes_one_picture_at_a_time(name: str, tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases[name]))
    sizes: list[int] = []
    for coder in (family.parts["vae"].encoder, family.parts["vae"].decoder):
        coder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    latents = torch.randn(3, family.codec.channels, 16, 16, generator=torch.Generator().manual_seed(0))
    together = family.codec.decode(latents)
    alone = torch.cat([family.codec.decode(latents[k : k + 1]) for k in range(3)])
    assert torch.equal(together, alone)
    encoded = family.codec.encode(together.clamp(-1, 1))
    assert torch.equal(encoded.mean[1], family.codec.encode(together[1:2].clamp(-1, 1)).mean[0])
    draw(family, ["a mug", "a dog"], Sampling(steps=1), seeds=[1, 2])
    family.parts.release(["vae"])
    family.parts.restore(["vae"])
    family.parts["vae"].decoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    family.codec.decode(latents)
    assert len(sizes) >= 3 + 3 + 3 + 1 + 2 + 3
    assert set(sizes) == {1}


def test_an_error_while_drawing_leaves_the_modes_as_they_were(tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases["sd1"]))
    denoiser = family.parts["denoiser"].train()
    denoiser.conv_in.eval()
    before = {name: module.training for name, module in denoiser.named_modules()}

    def stop(amount: int) -> None:
        assert not any(module.training for part in family.parts.values() for module in part.modules())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(family, ["a mug"], Sampling(steps=1), seeds=[1], advance=stop)
    assert {name: module.training for name, module in denoiser.named_modules()} == before
    assert not family.parts["vae"].training


SCHEDULER = ("scheduler", "scheduler_config.json")


def changed(base: Path, to: Path, file: str, **values: object) -> Path:
    """A copy of a base with other values in one of its JSON files."""
    shutil.copytree(base, to)
    held = json.loads((to / file).read_text())
    (to / file).write_text(json.dumps(held | values))
    return to


def their_picture(base: Path, kind: str, **call: object) -> np.ndarray:
    pipeline = getattr(diffusers, kind).from_pretrained(base)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False
    )
    pipeline.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(5)
    return np.asarray(
        pipeline(
            "a mug", num_inference_steps=3, guidance_scale=4.0, width=32, height=32, generator=seed, **call
        ).images[0]
    )


def our_picture(base: Path) -> np.ndarray:
    settings = Sampling(sampler="ddim", steps=3, guidance=4.0, size=32)
    return np.asarray(draw(load_family(str(base)), ["a mug"], settings, seeds=[5])[0])


@pytest.mark.parametrize("zeros", [True, False, None])
def test_no_negative_prompt_is_what_the_bases_pipeline_makes_of_none(
    zeros: bool | None, tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    """diffusers' plain call, without a negative prompt, bit for bit: zeros, or the encoded empty prompt."""
    given = {} if zeros is None else {"force_zeros_for_empty_prompt": zeros}
    base = changed(tiny_bases["sdxl"], tmp_path / "base", "model_index.json", **given)
    kind = "StableDiffusionXLPipeline"
    plain, encoded = their_picture(base, kind), their_picture(base, kind, negative_prompt="")
    assert np.array_equal(our_picture(base), plain)
    assert np.array_equal(plain, encoded) is (zeros is False)


@pytest.mark.parametrize(("name", "kind"), [("sd1", "StableDiffusionPipeline"), ("sdxl", "StableDiffusionXLPipeline")])
def test_zero_terminal_snr_rescales_the_guidance(
    name: str, kind: str, tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    """arXiv:2305.08891 section 3.4 with its phi of 0.7, as diffusers' own call gives it; other bases as ever."""
    zero = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    base = changed(tiny_bases[name], tmp_path / "base", "/".join(SCHEDULER), **zero)
    rescaled, plain = their_picture(base, kind, guidance_rescale=0.7), their_picture(base, kind)
    assert not np.array_equal(rescaled, plain)
    assert np.array_equal(our_picture(base), rescaled)
    assert np.array_equal(our_picture(tiny_bases[name]), their_picture(tiny_bases[name], kind))


def test_a_pipeline_without_guidance_rescale_is_drawn_with_all_the_same(
    tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    zero = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    base = changed(tiny_bases["sd1"], tmp_path / "base", "/".join(SCHEDULER), **zero)
    family = load_family(str(base))
    family.widen("inpaint")
    assert draw(family, ["a mug"], Sampling(steps=1, size=32), seeds=[5])[0].size == (32, 32)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Sampling(guidance=float("nan")), "guidance is nan"),
        (Sampling(guidance=float("inf")), "guidance is inf"),
        (Sampling(steps=5000), "steps is 5,000 but the base's schedule has 1,000"),
        (Sampling(size=33), "size is 33 .* choose 32"),
        (Sampling(size=10**6), "choose 8192"),
        (Sampling(sampler="magic"), "magic"),
    ],
)
def test_what_draws_no_image_is_refused(settings: Sampling, words: str, tiny_bases: dict[str, Path]) -> None:
    with pytest.raises(BadInput, match=words):
        draw(load_family(str(tiny_bases["sd1"])), ["a mug"], settings, seeds=[1])
