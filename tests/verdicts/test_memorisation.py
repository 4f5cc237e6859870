"""Copies of photos are found, mirrored ones too, and other images are not."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from finetune.verdicts.memorisation import PhotoLatents, difference_hash, memorised


def picture(seed: int) -> Image.Image:
    """A smooth random image of 64 pixels."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((64, 64), Image.Resampling.BICUBIC)


def latents(images: list[Image.Image]) -> Tensor:
    """Pixels at an eighth of the size: a linear codec."""
    small = [np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=np.float32) / 127.5 - 1 for image in images]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2)


def noisy(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(int) + np.random.default_rng(9).integers(-6, 7, (64, 64, 3))
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def test_the_hash_is_the_sign_of_each_step_to_the_right() -> None:
    ramp = np.tile(np.linspace(0, 255, 72).astype(np.uint8), (64, 1))
    assert difference_hash(Image.fromarray(ramp)).all()
    assert not difference_hash(Image.fromarray(ramp[:, ::-1].copy())).any()
    assert difference_hash(picture(0)).shape == (64,)


def test_copies_are_told_from_other_images() -> None:
    photos = [picture(seed) for seed in range(5)]
    held = PhotoLatents(photos, latents(photos))
    copies = {"copy": noisy(photos[3]), "mirrored": ImageOps.mirror(noisy(photos[1]))}
    drawn = copies | {"new": picture(50), "other": picture(51)}
    found = memorised(drawn, latents(list(drawn.values())), held)
    assert [item.copied for item in found.nearest] == [True, True, False, False]
    assert [item.photo for item in found.nearest[:2]] == [3, 1]
    assert found.copies == 2
    assert found.sentence.startswith("2 of 4")


def test_one_photo_has_no_distance_between_photos() -> None:
    photos = [picture(0)]
    drawn = {"copy": noisy(photos[0]), "new": picture(7)}
    found = memorised(drawn, latents(list(drawn.values())), PhotoLatents(photos, latents(photos)))
    assert [item.copied for item in found.nearest] == [True, False]
    others = memorised({"new": picture(7)}, latents([picture(7)]), PhotoLatents(photos, latents(photos)))
    assert others.sentence.startswith("None of 1")
