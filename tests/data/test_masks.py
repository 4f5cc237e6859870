"""Masked loss: the closed form, the masks' geometry against Pillow's, and trainings that ignore the background."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from finetune.config.load import parse_recipe
from finetune.config.recipe import Recipe
from finetune.core.batch import Batch, Geometry, Latents
from finetune.core.errors import BadInput
from finetune.core.rng import SampleKey
from finetune.data.batches import Batches
from finetune.data.crops import Crop, make_crops
from finetune.data.masks import Masks, find_masks
from finetune.data.photos import Photo, scan
from finetune.data.samplers import Sample, ShuffleSampler
from finetune.families.registry import FAMILIES
from finetune.families.source import load_family
from finetune.jobs import train as job
from finetune.jobs.plan import plan
from finetune.jobs.prepare import prepare
from finetune.objectives.loss import per_sample
from finetune.objectives.registry import build_objective
from finetune.objectives.settings import ObjectiveSettings
from finetune.runs.plan import plan_rows
from finetune.training.step import Step

# the reduction


def test_the_masked_mean_is_its_closed_form() -> None:
    error, mask = torch.rand(3, 4, 5, 6), torch.rand(3, 1, 5, 6)
    for row, value in enumerate(per_sample(error, mask).tolist()):
        total = sum(
            float(mask[row, 0, y, x]) * float(error[row, c, y, x])
            for c in range(4)
            for y in range(5)
            for x in range(6)
        )
        assert value == pytest.approx(total / (4 * float(mask[row].sum())), rel=1e-5)


def test_no_mask_is_the_plain_mean_bit_for_bit_and_ones_are_the_same() -> None:
    error = torch.rand(3, 4, 5, 6)
    assert torch.equal(per_sample(error), error.flatten(1).mean(1))
    torch.testing.assert_close(per_sample(error, torch.ones(3, 1, 5, 6)), error.mean((1, 2, 3)))


def test_the_size_of_the_subject_does_not_change_its_loss() -> None:
    error, mask = torch.full((2, 4, 8, 8), 0.7), torch.zeros(2, 1, 8, 8)
    mask[0, :, :2, :2], mask[1, :, :, 3:] = 1, 0.25
    assert per_sample(error, mask).tolist() == pytest.approx([0.7, 0.7])


def test_a_black_crop_costs_nothing_and_a_faint_one_counts_in_full() -> None:
    error = torch.rand(2, 4, 64, 64, requires_grad=True)
    mask = torch.zeros(2, 1, 64, 64)
    mask[1, 0, 5, 5] = 1 / 255 / 64  # one pixel of one latent, in the darkest grey
    loss = per_sample(error, mask)
    assert loss[0] == 0
    assert float(loss[1]) == pytest.approx(float(error[1, :, 5, 5].mean()), rel=1e-4)
    loss.sum().backward()
    assert torch.isfinite(error.grad).all()
    assert not error.grad[0].any()


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_background_has_no_gradient(family: str, tiny_bases: dict[str, Path]) -> None:
    """The step's loss and the gradient of every weight stay the same whatever is predicted outside the mask."""
    base = load_family(str(tiny_bases[family]))
    base.parts["denoiser"].requires_grad_(True)
    predict, made = base.predict, torch.Generator().manual_seed(0)
    mask = (torch.rand(2, 1, 16, 16, generator=made) > 0.6).float()
    mean = torch.randn(2, 4, 16, 16, generator=made)
    square = [Geometry((32, 32), (0, 0), (32, 32))] * 2
    draws = [SampleKey(0, 0, 0), SampleKey(0, 0, 1)]
    batch = Batch(Latents(mean, mean * 0), ["a", "b"], torch.ones(2), square, draws, ["a", "b"], mask)
    ends = []
    for noise in (None, 1 - mask, mask):
        base.parts["denoiser"].zero_grad()
        more = 0.0 if noise is None else 3 * noise * torch.randn(2, 4, 16, 16, generator=made)
        base.predict = lambda *args, more=more: predict(*args) + more
        loss = Step(base, ["denoiser"], build_objective(ObjectiveSettings(), base.schedule), base.encode_prompts)(
            batch
        )
        loss.backward()
        grads = {n: p.grad.clone() for n, p in base.parts["denoiser"].named_parameters() if p.grad is not None}
        ends.append((loss.detach(), grads))
    (plain, grads), (outside, grads_outside), (inside, _) = ends
    assert torch.equal(plain, outside)
    assert grads
    assert all(torch.equal(grads[name], grads_outside[name]) for name in grads)
    assert inside > plain


# masks of views


def half(size: tuple[int, int]) -> Image.Image:
    """White above, black below."""
    image = Image.new("L", size, 0)
    image.paste(255, (0, 0, size[0], size[1] // 2))
    return image


@pytest.fixture
def masked(photos: Path) -> Path:
    """0 has a mask beside it, 1 one in masks/, 2 an alpha channel."""
    half((48, 40)).save(photos / "0.mask.png")
    (photos / "masks").mkdir()
    half((48, 40)).save(photos / "masks" / "1.png")
    with Image.open(photos / "2.png") as image:
        image.putalpha(half((48, 40)))
        image.save(photos / "2.png")
    return photos


def test_masks_are_no_photos_and_each_source_is_found(masked: Path) -> None:
    found = scan(masked)
    assert [photo.path.name for photo in found] == ["0.png", "1.png", "2.png"]
    assert find_masks(masked, found, "none") == {}
    masks = find_masks(masked, found, "auto")
    assert {path.name: (mask.file.relative_to(masked).as_posix(), mask.alpha) for path, mask in masks.items()} == {
        "0.png": ("0.mask.png", False),
        "1.png": ("masks/1.png", False),
        "2.png": ("2.png", True),
    }
    for mask in masks.values():
        assert mask.open().tobytes() == half((48, 40)).tobytes()


@pytest.mark.parametrize("target", [(32, 32), (24, 40), (44, 24)])
def test_a_mask_goes_the_way_of_its_view(photos: Path, target: tuple[int, int]) -> None:
    """Against Pillow: resized with the photo, mirrored as a whole, cropped where the geometry says, averaged."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 48), dtype=np.uint8)
    Image.fromarray(noise).save(photos / "0.mask.png")
    photo = scan(photos)[0]
    made = make_crops(photo, target, "random", 3, True, 0)
    masks = Masks(find_masks(photos, [photo], "files"), 2, 0.0).fill(made)
    for view in made:
        shown = Image.fromarray(noise).resize(view.resized, Image.Resampling.BILINEAR)
        shown = shown.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flip else shown
        top, left = view.geometry.crop
        part = np.asarray(shown.crop((left, top, left + target[0], top + target[1])), dtype=np.float64) / 255
        wanted = part.reshape(target[1] // 2, 2, target[0] // 2, 2).mean((1, 3))
        np.testing.assert_allclose(masks.mask(view)[0].numpy(), wanted, atol=1e-6)
    assert {view.flip for view in made} == {False, True}


def test_the_floor_lifts_the_background_and_leaves_the_subject(masked: Path) -> None:
    photo = scan(masked)[0]
    (view,) = make_crops(photo, 40, "center", 1, False, 0)
    mask = Masks(find_masks(masked, [photo], "auto"), 2, 0.25).fill([view]).mask(view)
    assert mask[0, :10].eq(1).all()
    assert mask[0, 10:].eq(0.25).all()


def test_an_exif_rotation_turns_the_alpha_channel_too(photos: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # 90 degrees clockwise: what is above is then on the right
    image = Image.new("RGB", (48, 40), "red")
    image.putalpha(half((48, 40)))
    image.save(photos / "0.png", exif=exif)
    photo = scan(photos)[0]
    mask = np.asarray(find_masks(photos, [photo], "alpha")[photo.path].open())
    assert mask.shape == (48, 40)
    assert (mask[:, 20:] == 255).all()
    assert (mask[:, :20] == 0).all()


def test_names_and_which_mask_wins(masked: Path) -> None:
    """A file before alpha, beside the photo before masks/, and a suffix in capitals."""
    half((48, 40)).save(masked / "masks" / "0.png")
    half((48, 40)).save(masked / "2.MASK.PNG")
    found = scan(masked)
    assert [photo.path.name for photo in found] == ["0.png", "1.png", "2.png"]
    for source, names in {
        "auto": ["0.mask.png", "1.png", "2.MASK.PNG"],
        "files": ["0.mask.png", "1.png", "2.MASK.PNG"],
        "alpha": ["2.png"],
    }.items():
        wanted = found[2:] if source == "alpha" else found
        assert [mask.file.name for mask in find_masks(masked, wanted, source).values()] == names


def test_transparent_parts_of_a_mask_file_are_background(photos: Path) -> None:
    image = Image.new("RGBA", (48, 40), (255, 255, 255, 0))
    image.paste((255, 255, 255, 255), (0, 0, 48, 20))
    image.save(photos / "0.mask.png")
    photo = scan(photos)[0]
    assert find_masks(photos, [photo], "files")[photo.path].open().tobytes() == half((48, 40)).tobytes()


class Zeros:
    def conditions(self, view: Crop) -> dict[str, torch.Tensor]:
        return {}

    def latents(self, view: Crop) -> Latents:
        value = torch.zeros(4, view.size[1] // 2, view.size[0] // 2)
        return Latents(value, value)


def test_batches_hold_the_masks_of_their_views(masked: Path) -> None:
    """Photos in stream 0 as they are shown, class images with ones."""
    found = scan(masked)
    subject = [Sample(make_crops(p, 32, "random", 2, True, 0), ["a"], 1.0, 0.0, p.path.name) for p in found]
    drawn = Photo(masked / "class.png", (32, 32), "d")
    other = [Sample(make_crops(drawn, 32, "center", 1, False, 0), ["b"], 1.0, 0.0, "class")]
    masks = Masks(find_masks(masked, found, "auto"), 2, 0.0)
    masks.fill([view for sample in subject for view in sample.crops])
    batch = Batches(ShuffleSampler([subject, other], 0, 3), Zeros(), masks=masks).micro(0, 0)
    assert batch.mask is not None
    assert batch.mask.shape == (6, 1, 16, 16)
    for row in range(0, 6, 2):  # the photo's upper half, however it is cropped from side to side
        assert batch.mask[row, :, :7].eq(1).all()
        assert batch.mask[row, :, 9:].eq(0).all()
    assert batch.mask[1::2].eq(1).all()
    assert Batches(ShuffleSampler([subject, other], 0, 3), Zeros()).micro(0, 0).mask is None


# the whole job


def recipe(base: Path, photos: Path, *overrides: str) -> Recipe:
    return parse_recipe(
        {
            "base": str(base),
            "data": {"photos": str(photos), "class_noun": "mug", "masks": "auto", "flip": True, "crop": "random"},
            "prior": {"kind": "class_images", "count": 2, "steps": 1},
            "method": {"kind": "lora", "rank": 2},
            "optim": {"kind": "adamw", "lr": 1e-3},
            "run": {"steps": 4, "batch_size": 2},
            "sample": {"count": 1, "steps": 1, "prompts": ["a {noun}"]},
        },
        list(overrides),
    )


@pytest.mark.parametrize("family", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_what_is_predicted_for_the_background_changes_nothing(
    family: str, tiny_bases: dict[str, Path], masked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mask files and alpha: noise on the prediction in the lower part of the photos leaves the same weights, bit for
    bit; noise in the upper part, or in the class images, does not, and neither does it without masks."""
    kind = FAMILIES[family]
    predict = kind.predict

    def end(name: str, rows: slice, first: int, *overrides: str) -> dict[str, torch.Tensor]:
        def noisy(self: object, x: torch.Tensor, *rest: object) -> torch.Tensor:
            out = predict(self, x, *rest)
            more = torch.zeros_like(out)
            if out.requires_grad:
                more[first::2, :, rows] = torch.randn(out[first::2, :, rows].shape) * 2
            return out + more

        monkeypatch.setattr(kind, "predict", noisy)
        run = job.train(recipe(tiny_bases[family], masked, "export.formats=[kohya]", *overrides), tmp_path / name)
        return load_file(run / "adapter" / "trained.safetensors")

    def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(one[name], other[name]) for name in one)

    plain = end("plain", slice(0, 0), 0)
    assert same(plain, end("below", slice(9, None), 0))
    assert not same(plain, end("above", slice(0, 7), 0))
    assert not same(plain, end("classes", slice(9, None), 1))
    whole = end("whole", slice(0, 0), 0, "data.masks=none")
    assert not same(plain, whole)
    assert not same(whole, end("whole-below", slice(9, None), 0, "data.masks=none"))


def test_masks_and_buckets_train_together(tiny_bases: dict[str, Path], masked: Path, tmp_path: Path) -> None:
    with Image.open(masked / "1.png") as image:
        image.resize((30, 60)).save(masked / "1.png")
    half((30, 60)).save(masked / "masks" / "1.png")
    wanted = recipe(tiny_bases["sd1"], masked, "data.shape=buckets", "data.mask_floor=0.1", "export.formats=[kohya]")
    run = job.train(wanted, tmp_path / "run")
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4


def test_auto_without_any_mask_is_no_mask(tiny_bases: dict[str, Path], photos: Path) -> None:
    found = prepare(recipe(tiny_bases["sd1"], photos))
    assert found.masks == {}
    assert plan_rows(plan(found))["masks"] == "0 of 3 photos have one; the background has weight 0"
    half((48, 40)).save(photos / "0.mask.png")
    told = plan_rows(plan(prepare(recipe(tiny_bases["sd1"], photos, "data.mask_floor=0.1"))))
    assert told["masks"] == "1 of 3 photos have one; the background has weight 0.1"
    assert "masks" not in plan_rows(plan(prepare(recipe(tiny_bases["sd1"], photos, "data.masks=none"))))


def test_a_mask_of_other_size_but_the_same_shape_is_taken(photos: Path) -> None:
    half((24, 20)).save(photos / "0.mask.png")
    photo = scan(photos)[0]
    assert find_masks(photos, [photo], "files")[photo.path].open().size == (24, 20)
    half((24, 24)).save(photos / "0.mask.png")
    with pytest.raises(BadInput, match=r"0\.mask\.png is 24x24 but its photo is 48x40"):
        find_masks(photos, [photo], "files")


def test_a_later_run_in_this_process_has_the_mask_as_it_is_then(photos: Path) -> None:
    """As in a notebook: the only mask is corrected, and the training is started again."""
    held, file = [], photos / "0.mask.png"
    for side in ((0, 0, 24, 40), (24, 0, 48, 40)):
        image = Image.new("L", (48, 40), 0)
        image.paste(255, side)
        image.save(file)
        found = scan(photos)
        (crop,) = make_crops(found[0], (40, 40), "center", 1, False, 0)
        held.append(Masks(find_masks(photos, found, "auto"), 8, 0.0).fill([crop]).mask(crop))
    assert torch.allclose(held[0] + held[1], torch.ones(1, 5, 5), atol=1e-6)


@pytest.mark.parametrize("name", ["0.mask.png", "0.png"])
def test_a_mask_that_changes_during_a_run_is_refused(photos: Path, name: str) -> None:
    """The run's record says what it was when the run began; class images are drawn before it is read again."""
    photo = Image.new("RGB", (48, 40), "red")
    photo.putalpha(half((48, 40)))
    (photo if name == "0.png" else half((48, 40))).save(photos / name)
    found = scan(photos)
    (crop,) = make_crops(found[0], (40, 40), "center", 1, False, 0)
    masks = Masks(find_masks(photos, found, "auto"), 8, 0.0)
    changed = Image.new("RGBA" if name == "0.png" else "L", (48, 40), "white")
    changed.save(photos / name)
    with pytest.raises(BadInput, match=rf"{name} changed since it was first read"):
        masks.fill([crop])
