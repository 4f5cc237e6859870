"""Extra inputs of photos: masks, depth maps and pairs, against diffusers' own preparation of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from finetune.core.errors import BadInput
from finetune.core.processes import Processes
from finetune.core.rng import SampleKey
from finetune.data.batches import Batches
from finetune.data.cache import LatentCache
from finetune.data.conditioning.base import INPUTS, Choices, Inputs, make_inputs
from finetune.data.conditioning.depth import Depth, scaled
from finetune.data.conditioning.edit import dropped
from finetune.data.conditioning.inpaint import Inpaint, MaskedCrop
from finetune.data.crops import Crop, make_crops
from finetune.data.decoding import open_values
from finetune.data.photos import image_files, scan
from finetune.data.samplers import Sample, ShuffleSampler
from finetune.families.base import Family
from finetune.families.source import load_family

CHOICES = Choices(seed=3, mask_count=6, edit_dropout=0.0, image_guidance=1.5)
DRAWS = [SampleKey(3, step, 0) for step in range(40)]


@pytest.fixture
def companions(photos: Path) -> Path:
    """The photos, each with a depth map of 16 bits and few of its levels, and a picture before."""
    for number, file in enumerate(sorted(photos.glob("*.png"))):
        deep = (np.add.outer(np.arange(40) * 7, np.arange(48) * (number + 1)) + 100).astype(np.uint16)
        Image.fromarray(deep).save(photos / f"{file.stem}.depth.png")
        ImageOps.invert(Image.open(file)).save(photos / f"{file.stem}.before.png")
    return photos


def family_of(kind: str, tiny_bases: dict[str, Path]) -> Family:
    family = load_family(str(tiny_bases["sd1"]))
    family.widen(kind)
    return family


def made(kind: str, folder: Path, tiny_bases: dict, choices: Choices = CHOICES) -> tuple[Family, Inputs, list[Crop]]:
    family = family_of(kind, tiny_bases)
    photos = scan(folder)
    inputs = make_inputs(family, photos, choices)
    assert inputs is not None
    return family, inputs, [view for photo in photos for view in make_crops(photo, (32, 32), "random", 2, True, 1)]


def filled(family: Family, inputs: Inputs, seen: list[Crop], tmp_path: Path) -> LatentCache:
    cache = LatentCache(tmp_path / "cache", "base")
    cache.fill(family, [image for view in seen for image in inputs.images(view)])
    return cache


def test_a_plain_base_has_none(photos: Path, tiny_bases: dict[str, Path]) -> None:
    assert make_inputs(load_family(str(tiny_bases["sd1"])), scan(photos), CHOICES) is None
    assert sorted(INPUTS) == ["depth", "edit", "inpaint"]


@pytest.fixture
def no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers draws from the VAE's distribution; here its mean is taken."""
    kind = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution
    monkeypatch.setattr(kind, "sample", lambda self, generator=None: self.mean)


def test_masks_and_masked_latents_are_the_pipelines(
    photos: Path, tiny_bases: dict[str, Path], tmp_path: Path, no_noise: None
) -> None:
    family, inputs, seen = made("inpaint", photos, tiny_bases)
    cache, pipeline = filled(family, inputs, seen, tmp_path), family.drawing.pipeline()
    for view, draw in zip(seen, DRAWS, strict=False):
        ours = inputs.extra(view, draw, cache)
        number = next(n for n in range(6) if torch.equal(_small(view, n), ours[:1]))
        mask = Image.fromarray((MaskedCrop(view, 3, number).mask()[0].numpy() * 255).astype(np.uint8))
        image = pipeline.image_processor.preprocess(view.image(), height=32, width=32)
        condition = pipeline.mask_processor.preprocess(mask, height=32, width=32)
        masked = image * (condition < 0.5)
        theirs = pipeline.prepare_mask_latents(condition, masked, 1, 32, 32, torch.float32, "cpu", None, False)
        close = (
            1e-2 if bool((condition == 1).all()) else 1e-5
        )  # normalising a picture of one grey blows up its last bits
        assert torch.allclose(ours, torch.cat(theirs, 1)[0], atol=close)


def _small(view: Crop, number: int) -> torch.Tensor:
    return MaskedCrop(view, 3, number).mask()[:, ::2, ::2]


def test_masks_are_a_function_of_seed_view_and_number(photos: Path) -> None:
    (view,) = make_crops(scan(photos)[0], (32, 32), "center", 1, False, 0)
    masks = [MaskedCrop(view, 1, n).mask() for n in range(400)]
    assert all(set(mask.unique().tolist()) <= {0.0, 1.0} and mask.sum() >= 8 for mask in masks)
    assert 0.17 < sum(float(mask.mean()) == 1 for mask in masks) / 400 < 0.33  # a quarter: 5 sigma is .11
    shares = torch.tensor([float(mask.mean()) for mask in masks])
    assert len(shares.unique()) > 200
    again = MaskedCrop(view, 1, 7)
    assert torch.equal(again.mask(), masks[7])
    assert len({MaskedCrop(view, seed, 7).key for seed in range(5)}) == 5
    assert not torch.equal(MaskedCrop(replace(view, flip=True), 1, 7).mask(), masks[7])


def test_each_step_draws_its_mask(photos: Path, tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    family, inputs, seen = made("inpaint", photos, tiny_bases)
    cache = filled(family, inputs, seen[:1], tmp_path)
    drawn = [inputs.extra(seen[0], draw, cache) for draw in DRAWS]
    assert all(torch.equal(a, inputs.extra(seen[0], draw, cache)) for a, draw in zip(drawn, DRAWS, strict=True))
    assert len({tuple(extra.flatten().tolist()) for extra in drawn}) == 6
    assert isinstance(inputs, Inpaint)
    assert inputs.any_image


def test_depth_is_the_pipelines(companions: Path, tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """Each view's crop of the depth map, of all its 16 bits, prepared as the pipeline does."""
    family, inputs, _ = made("depth", companions, tiny_bases)
    assert isinstance(inputs, Depth)
    pipeline = family.drawing.pipeline()
    for photo in scan(companions):
        whole = Crop(photo, (40, 40), photo.size, (4, 0), False)  # at the photo's own size: nothing is resized
        values = torch.from_numpy(open_values(companions / f"{photo.path.stem}.depth.png"))
        assert len(values.unique()) > 40  # levels that 8 bits would not keep apart
        for view, cut in ((whole, values[:, 4:44]), (replace(whole, flip=True), values[:, 4:44].flip(1))):
            theirs = pipeline.prepare_depth_map([view.image()], cut[None], 1, False, torch.float32, "cpu")
            assert torch.allclose(inputs.extra(view, DRAWS[0], LatentCache(tmp_path, "")), theirs[0], atol=1e-5)
            given = inputs.condition(view)
            assert given.beside is not None
            again = pipeline.prepare_depth_map([view.image()], given.beside, 1, False, torch.float32, "cpu")
            assert torch.allclose(again, theirs, atol=1e-4)


def test_flat_depth_gives_zeros() -> None:
    assert not scaled(torch.full((1, 8, 8), 3.0), 2).any()


def test_edits_are_the_pipelines(companions: Path, tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    family, inputs, seen = made("edit", companions, tiny_bases)
    cache, pipeline = filled(family, inputs, seen, tmp_path), family.drawing.pipeline()
    for view in seen:
        before = ImageOps.invert(view.image())  # every step from file to view is linear but for rounding
        pixels = pipeline.image_processor.preprocess(before)
        theirs = pipeline.prepare_image_latents(pixels, 1, 1, torch.float32, "cpu", False)
        ours = inputs.extra(view, DRAWS[0], cache)
        assert torch.allclose(ours, theirs[0], atol=0.02)
        assert not torch.allclose(ours, cache_of_after(family, view), atol=0.05)
        assert inputs.prompt("make it red", DRAWS[0]) == "make it red"


def cache_of_after(family: Family, view: Crop) -> torch.Tensor:
    return family.codec.encode(view.pixels()[None]).mean[0] / family.codec.scaling


def test_edit_dropout_is_the_papers() -> None:
    """5 % without the picture, 5 % without the instruction, 5 % without both (arXiv:2211.09800 section 3.2.1)."""
    draws = [SampleKey(0, step, sample) for step in range(1000) for sample in range(4)]
    found = [dropped(draw, 0.05) for draw in draws]
    for case in ((True, False), (False, True), (True, True)):
        assert abs(found.count(case) / 4000 - 0.05) < 0.0138  # 4 sigma
    assert all(dropped(draw, 0.0) == (False, False) for draw in draws[:100])
    assert {dropped(draw, 1 / 3) for draw in draws} == {(True, False), (False, True), (True, True)}


def test_dropped_edits_are_zeros_and_empty(companions: Path, tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    family, inputs, seen = made("edit", companions, tiny_bases, replace(CHOICES, edit_dropout=0.2))
    cache = filled(family, inputs, seen[:1], tmp_path)
    for draw in DRAWS:
        image, text = dropped(draw, 0.2)
        assert bool(inputs.extra(seen[0], draw, cache).any()) != image
        assert inputs.prompt("x", draw) == ("" if text else "x")
    assert len({dropped(draw, 0.2) for draw in DRAWS}) == 4


def test_companions_are_no_photos(companions: Path) -> None:
    (companions / "sunset.before.png").write_bytes((companions / "0.png").read_bytes())
    assert [file.name for file in image_files(companions)] == ["0.png", "1.png", "2.png", "sunset.before.png"]


def test_all_missing_companions_are_named(companions: Path, tiny_bases: dict[str, Path]) -> None:
    for name in ("0.depth.png", "2.depth.png"):
        (companions / name).unlink()
    with pytest.raises(BadInput, match=r"no depth image for 0\.png, 2\.png: put NAME\.depth\.png beside each$"):
        made("depth", companions, tiny_bases)


@pytest.mark.parametrize(
    ("kind", "name", "size", "colour", "said"),
    [
        ("depth", "1.depth.png", (48, 40), 7, r"1\.depth\.png is 7 everywhere"),
        ("depth", "1.depth.png", (40, 40), 7, r"1\.depth\.png is 40x40 but its photo 1\.png is 48x40"),
        ("edit", "1.before.png", (60, 40), 7, r"1\.before\.png is 60x40 but its photo"),
    ],
)
def test_bad_companions(
    kind: str, name: str, size: tuple, colour: int, said: str, companions: Path, tiny_bases: dict[str, Path]
) -> None:
    Image.new("L", size, colour).save(companions / name)
    with pytest.raises(BadInput, match=said) as caught:
        made(kind, companions, tiny_bases)
    assert "\n" not in str(caught.value)


def test_a_damaged_companion_names_its_photo(companions: Path, tiny_bases: dict[str, Path]) -> None:
    (companions / "1.before.png").write_bytes(b"no picture")
    with pytest.raises(BadInput, match=r"the before image of 1\.png can't be used"):
        made("edit", companions, tiny_bases)


def test_batches_carry_extra_inputs_and_lose_both_together(
    companions: Path, tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    """A batch of 12 and its cut into 3 on 2 processes: the same channels, and the same prompts dropped."""
    family, inputs, seen = made("edit", companions, tiny_bases, replace(CHOICES, edit_dropout=0.3))
    cache = filled(family, inputs, seen, tmp_path)
    cache.fill(family, seen)
    streams = [[Sample([view], ["make it red"], 1.0, 0.0, view.photo.path.name) for view in seen]]
    sampler = ShuffleSampler(streams, 3, 12)
    whole = Batches(sampler, cache, inputs=inputs).micro(0, 0)
    parts = [
        Batches(sampler, cache, 3, Processes(rank, 2), inputs=inputs).micro(0, n)
        for n in range(3)
        for rank in range(2)
    ]
    assert whole.extra is not None
    assert torch.equal(whole.extra, torch.cat([part.extra for part in parts if part.extra is not None]))
    assert whole.prompts == [prompt for part in parts for prompt in part.prompts]
    for draw, prompt, extra in zip(whole.keys, whole.prompts, whole.extra, strict=True):
        assert (not extra.any(), prompt == "") == dropped(draw, 0.3)
    noisy = torch.randn(12, 4, 16, 16)
    assert torch.equal(whole.concat_conditioning(noisy), torch.cat([noisy, whole.extra], 1))
    assert Batches(sampler, cache).micro(0, 0).extra is None


def test_photos_of_one_content_keep_their_own_depth(companions: Path, tiny_bases: dict[str, Path]) -> None:
    """Two copies of a photo with different maps: the second one had the first one's."""
    (companions / "0-copy.png").write_bytes((companions / "0.png").read_bytes())
    upside = Image.fromarray(np.flipud(open_values(companions / "0.depth.png")).astype(np.uint16))
    upside.save(companions / "0-copy.depth.png")
    _, inputs, seen = made("depth", companions, tiny_bases)
    pair = {view.photo.path.name: inputs.extra(view, SampleKey(0, 0, 0), None) for view in seen if not view.flip}  # type: ignore[arg-type]
    assert not torch.equal(pair["0.png"], pair["0-copy.png"])


def test_a_depth_map_that_changed_is_not_taken_for_the_first(companions: Path, tiny_bases: dict[str, Path]) -> None:
    _, inputs, seen = made("depth", companions, tiny_bases)
    file = companions / f"{seen[0].photo.path.stem}.depth.png"
    Image.fromarray(np.flipud(open_values(file)).astype(np.uint16)).save(file)
    with pytest.raises(BadInput, match=r"depth\.png changed since it was first read"):
        inputs.extra(seen[0], SampleKey(0, 0, 0), None)  # type: ignore[arg-type]
