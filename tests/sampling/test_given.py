"""Images drawn from files that a person gives: against diffusers' own pipelines, and what can't be is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from finetune.core.errors import BadInput
from finetune.families.registry import FAMILIES
from finetune.families.schedulers import make_scheduler
from finetune.families.source import load_family
from finetune.sampling.draw import draw
from finetune.sampling.given import DrawnFrom, Given, open_given, pictures
from finetune.sampling.settings import Sampling

SETTINGS = Sampling("blurry", sampler="ddim", steps=5, guidance=3.0, size=32)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A picture, a mask with grey edges, and a depth map of 16 bits: each 32x32."""
    made = np.random.default_rng(4)
    steps = np.add.outer(np.arange(32), 3 * np.arange(32))
    values = {
        "image": Image.fromarray(made.integers(0, 256, (32, 32, 3), dtype=np.uint8)),
        "mask": Image.fromarray((np.clip(steps - 40, 0, 17) * 15).astype(np.uint8)),
        "depth": Image.fromarray((steps * 300 + 77).astype(np.uint16)),
    }
    for name, image in values.items():
        image.save(tmp_path / f"{name}.png")
    return {name: tmp_path / f"{name}.png" for name in values}


def given_of(kind: str, files: dict[str, Path]) -> Given:
    if kind == "inpaint":
        return Given(files["image"], mask=files["mask"])
    if kind == "depth":
        return Given(files["image"], depth=files["depth"])
    return Given(files["image"], image_guidance=1.2)


def theirs_of(kind: str, files: dict[str, Path]) -> dict[str, Any]:
    """The arguments of diffusers' pipeline, made of the same files as its documentation does."""
    image = Image.open(files["image"]).convert("RGB")
    if kind == "inpaint":
        return {"image": image, "mask_image": Image.open(files["mask"]), "strength": 1.0, "width": 32, "height": 32}
    if kind == "depth":  # its own strength
        return {
            "image": image,
            "depth_map": torch.from_numpy(np.asarray(Image.open(files["depth"]), dtype=np.float32))[None],
        }
    return {"image": image, "image_guidance_scale": 1.2}


def pipeline_of(name: str, kind: str, base: Path) -> Any:
    family = FAMILIES[name]
    left_out = {"depth_estimator": None, "feature_extractor": None} if kind == "depth" else {}
    pipeline = getattr(diffusers, getattr(family, "pipelines")[kind]).from_pretrained(base, **left_out)  # noqa: B009
    pipeline.scheduler = make_scheduler(pipeline.scheduler, "ddim")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=int)


CASES = [(name, kind) for name, family in FAMILIES.items() for kind in getattr(family, "pipelines", {}) if kind]
every_case = pytest.mark.parametrize(("name", "kind"), CASES)


@every_case
def test_what_is_drawn_is_the_pipelines_picture(
    name: str, kind: str, wide_bases: dict, files: dict[str, Path]
) -> None:
    """From the same files and seed in fp32; and another image, mask or depth map would give another picture."""
    base = wide_bases[name, kind]
    more = {"width": 32, "height": 32} if (name, kind) == ("sdxl", "edit") else {}
    wanted = pipeline_of(name, kind, base)(
        "a mug", negative_prompt="blurry", num_inference_steps=5, guidance_scale=3.0,
        generator=torch.Generator().manual_seed(5), **theirs_of(kind, files), **more,
    ).images[0]  # fmt: skip
    family, given = load_family(str(base)), given_of(kind, files)
    opened = open_given(family, given, SETTINGS)
    assert opened.notes == []
    got = draw(family, ["a dog", "a mug"], SETTINGS, seeds=[9, 5], condition=opened.condition)[1]
    assert np.abs(levels(got) - levels(wanted)).max() <= 1
    for changed in family.drawing.wants.needed:
        mirrored = files[changed].with_name("mirrored.png")
        Image.open(files[changed]).transpose(Image.Transpose.ROTATE_180).save(mirrored)
        other = open_given(family, replace(given, **{changed: mirrored}), SETTINGS).condition
        assert np.abs(levels(draw(family, ["a mug"], SETTINGS, seeds=[5], condition=other)[0]) - levels(got)).max() > 1


@pytest.mark.parametrize(("name", "kind"), [("sd1", "inpaint"), ("sd2", "depth"), ("sdxl", "inpaint")])
def test_a_strength_is_the_pipelines(name: str, kind: str, wide_bases: dict, files: dict[str, Path]) -> None:
    base = wide_bases[name, kind]
    wanted = pipeline_of(name, kind, base)(
        "a mug", num_inference_steps=5, guidance_scale=1.0, generator=torch.Generator().manual_seed(5),
        **theirs_of(kind, files) | {"strength": 0.45},
    ).images[0]  # fmt: skip
    family, plain = load_family(str(base)), replace(SETTINGS, guidance=1.0, negative="")
    opened = open_given(family, replace(given_of(kind, files), strength=0.45), plain)
    got = draw(family, ["a mug"], plain, seeds=[5], condition=opened.condition)[0]
    assert np.abs(levels(got) - levels(wanted)).max() <= 1


def test_a_refiner_starts_from_the_given_image(tiny_bases: dict[str, Path], files: dict[str, Path]) -> None:
    base = tiny_bases["sdxl-refiner"]
    wanted = pipeline_of("sdxl-refiner", "", base)(
        "a mug", image=Image.open(files["image"]), strength=0.6, num_inference_steps=5, guidance_scale=3.0,
        negative_prompt="blurry", generator=torch.Generator().manual_seed(5),
    ).images[0]  # fmt: skip
    family = load_family(str(base))
    opened = open_given(family, Given(files["image"], strength=0.6), SETTINGS)
    got = draw(family, ["a mug"], SETTINGS, seeds=[5], condition=opened.condition)[0]
    assert np.abs(levels(got) - levels(wanted)).max() <= 1
    (note,) = open_given(family, Given(), SETTINGS, "--").notes
    assert note == "without --image this base starts from pure noise, for which it was not trained"


def test_a_depth_map_alone_decides_by_itself(wide_bases: dict, files: dict[str, Path]) -> None:
    """The image is not seen: the same pictures as from the depth map of a photo in previews."""
    family = load_family(str(wide_bases["sd2", "depth"]))
    opened = open_given(family, Given(depth=files["depth"]), SETTINGS)
    assert opened.condition is not None
    assert opened.condition.strength is None
    seen = replace(opened.condition, image=torch.rand(3, 32, 32))
    alone, beside = (draw(family, ["a mug"], SETTINGS, seeds=[5], condition=c)[0] for c in (opened.condition, seen))
    assert np.array_equal(levels(alone), levels(beside))
    assert list(pictures(family.drawing.wants, opened.condition)) == ["depth"]


@pytest.mark.parametrize("size", [(96, 64), (32, 80), (64, 64), (16, 16)])
def test_other_sizes_are_cropped_as_diffusers_crops(size: tuple[int, int], wide_bases: dict, tmp_path: Path) -> None:
    """`resize_mode="crop"` of diffusers gives the same pixels, where it need not round; the mask follows."""
    made = np.random.default_rng(1)
    pixels = made.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "mask.png")
    family = load_family(str(wide_bases["sd1", "inpaint"]))
    opened = open_given(family, Given(tmp_path / "image.png", mask=tmp_path / "mask.png"), SETTINGS)
    assert opened.condition is not None
    assert opened.condition.beside is not None
    theirs = VaeImageProcessor(do_normalize=False)
    wanted = theirs.preprocess(Image.fromarray(pixels), 32, 32, resize_mode="crop")[0]
    assert torch.equal(opened.condition.image, wanted)
    mask = VaeImageProcessor(do_normalize=False, do_convert_grayscale=True)
    wanted = mask.preprocess(Image.fromarray(pixels[..., 0]), 32, 32, resize_mode="crop")[0]
    assert torch.allclose(opened.condition.beside, wanted, atol=1.1 / 255)
    how = "scaled" if size[0] == size[1] else "scaled and cropped in the middle"
    shape = f"({size[0]}x{size[1]}) is {how} to 32x32"
    assert opened.notes == [f"image.png {shape}", f"mask.png {shape}"]


def test_what_was_read_is_shown_as_it_was(wide_bases: dict, files: dict[str, Path]) -> None:
    family = load_family(str(wide_bases["sd1", "inpaint"]))
    opened = open_given(family, given_of("inpaint", files), SETTINGS)
    assert opened.condition is not None
    shown = pictures(family.drawing.wants, opened.condition)
    assert list(shown) == ["image", "mask"]
    for name, image in shown.items():
        assert np.array_equal(levels(image), levels(Image.open(files[name]).convert("RGB")))


def test_a_transparent_mask_is_black(wide_bases: dict, files: dict[str, Path]) -> None:
    """An all-white mask whose shape is in its opacity: what is opaque is painted."""
    layer = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    layer.paste((255, 255, 255, 255), (4, 6, 20, 30))
    layer.save(files["mask"])
    opened = open_given(load_family(str(wide_bases["sd1", "inpaint"])), given_of("inpaint", files), SETTINGS)
    assert opened.condition is not None
    wanted = torch.zeros(1, 32, 32)
    wanted[:, 6:30, 4:20] = 1
    assert opened.condition.beside is not None
    assert torch.equal(opened.condition.beside, wanted)


@pytest.mark.parametrize("name", ["sd1", "sd3", "flux"])
def test_a_plain_base_draws_from_nothing_else(name: str, tiny_bases: dict[str, Path], files: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases[name]))
    assert open_given(family, Given(), SETTINGS) == DrawnFrom()
    with pytest.raises(BadInput, match=rf"^image is .*image\.png but this base \({name}\) draws from a prompt alone"):
        open_given(family, Given(files["image"]), SETTINGS)


def with_estimator(base: Path, folder: Path) -> Path:
    """The depth base with a small DPT of random weights in it."""
    shutil.copytree(base, folder)
    torch.manual_seed(3)
    config = transformers.DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
        use_batch_norm_in_fusion_residual=False, initializer_range=0.5,
    )  # fmt: skip
    transformers.DPTForDepthEstimation(config).save_pretrained(folder / "depth_estimator")
    prepare = transformers.DPTImageProcessor(size={"height": 32, "width": 32})
    prepare.save_pretrained(folder / "feature_extractor")
    index = json.loads((folder / "model_index.json").read_text())
    index["depth_estimator"] = ["transformers", "DPTForDepthEstimation"]
    index["feature_extractor"] = ["transformers", "DPTImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_a_base_with_an_estimator_makes_the_depth_map(
    wide_bases: dict, files: dict[str, Path], tmp_path: Path
) -> None:
    """From the image alone, as diffusers' pipeline does with the same folder."""
    base = with_estimator(wide_bases["sd2", "depth"], tmp_path / "base")
    pipeline = diffusers.StableDiffusionDepth2ImgPipeline.from_pretrained(base)
    pipeline.scheduler = make_scheduler(pipeline.scheduler, "ddim")
    wanted = pipeline(
        "a mug", image=Image.open(files["image"]), negative_prompt="blurry", num_inference_steps=5, guidance_scale=3.0,
        generator=torch.Generator().manual_seed(5),
    ).images[0]  # fmt: skip
    family = load_family(str(base))
    opened = open_given(family, Given(files["image"]), SETTINGS)
    assert opened.notes == ["the depth map is made of image.png by the base's own estimator"]
    got = draw(family, ["a mug"], SETTINGS, seeds=[5], condition=opened.condition)[0]
    assert np.abs(levels(got) - levels(wanted)).max() <= 1
    given = open_given(family, Given(files["image"], depth=files["depth"]), SETTINGS).condition
    assert np.abs(levels(draw(family, ["a mug"], SETTINGS, seeds=[5], condition=given)[0]) - levels(got)).max() > 1
    assert opened.condition is not None
    assert {image.size for image in pictures(family.drawing.wants, opened.condition).values()} == {(32, 32)}


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("depth_estimator/config.json", {"backbone": "resnet50"}, "a model to fetch"),
        ("depth_estimator/config.json", {"num_hidden_layers": 10**9}, "more than the limit"),
        (
            "feature_extractor/preprocessor_config.json",
            {"size": {"height": 10**6, "width": 32}},
            "height is 1000000, more than the limit",
        ),
        ("feature_extractor/preprocessor_config.json", {"size": "large"}, "configs are wrong"),
        ("feature_extractor/preprocessor_config.json", {"ensure_multiple_of": 10**6}, "more than the limit"),
    ],
)
def test_an_estimator_that_would_do_harm_is_refused(
    part: str, change: dict, said: str, wide_bases: dict, files: dict[str, Path], tmp_path: Path
) -> None:
    base = with_estimator(wide_bases["sd2", "depth"], tmp_path / "base")
    (base / part).write_text(json.dumps(json.loads((base / part).read_text()) | change))
    with pytest.raises(BadInput, match=said) as caught:
        open_given(load_family(str(base)), Given(files["image"]), SETTINGS)
    assert "\n" not in str(caught.value)
