"""Copies of photos are found, mirrored ones too, and other images are not."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from finetune.verdicts import memorisation
from finetune.verdicts.memorisation import PhotoLatents, difference_hash, memorised, photo_latents


def picture(seed: int) -> Image.Image:
    """A smooth random image of 64 pixels."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((64, 64), Image.Resampling.BICUBIC)


def latents(images: list[Image.Image]) -> Tensor:
    """Pixels at an eighth of the size: a linear codec."""
    small = [np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=np.float32) / 127.5 - 1 for image in images]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2)


def of(images: list[Image.Image]) -> PhotoLatents:
    return photo_latents(zip(images, latents(images), strict=True))


def noisy(image: Image.Image, seed: int = 9) -> Image.Image:
    values = np.asarray(image).astype(int) + np.random.default_rng(seed).integers(-6, 7, (64, 64, 3))
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def test_the_hash_is_the_sign_of_each_step_to_the_right() -> None:
    ramp = np.tile(np.linspace(0, 255, 72).astype(np.uint8), (64, 1))
    assert difference_hash(Image.fromarray(ramp)).all()
    assert not difference_hash(Image.fromarray(ramp[:, ::-1].copy())).any()
    assert difference_hash(picture(0)).shape == (64,)


def test_copies_are_told_from_other_images() -> None:
    photos = [picture(seed) for seed in range(5)]
    held = of(photos)
    copies = {"copy": noisy(photos[3]), "mirrored": ImageOps.mirror(noisy(photos[1]))}
    drawn = copies | {"new": picture(50), "other": picture(51)}
    found = memorised(list(drawn), of(list(drawn.values())), held)
    assert [item.copied for item in found.nearest] == [True, True, False, False]
    assert [item.photo for item in found.nearest[:2]] == [3, 1]
    assert found.copies == 2
    assert found.sentence.startswith("2 of 4")


def test_one_photo_has_no_distance_between_photos() -> None:
    photos = [picture(0)]
    drawn = {"copy": noisy(photos[0]), "new": picture(7)}
    found = memorised(list(drawn), of(list(drawn.values())), of(photos))
    assert [item.copied for item in found.nearest] == [True, False]
    others = memorised(["new"], of([picture(7)]), of(photos))
    assert others.sentence.startswith("None of 1")


@pytest.mark.parametrize("shots", [2, 5])
def test_shots_of_one_scene_count_as_one_photo(shots: int) -> None:
    """A burst, or a photo that lies there twice: what is nearer than half of their distance is no more than noise."""
    burst = [picture(0), *[noisy(picture(0), seed) for seed in range(1, shots)]]
    drawn = {"copy": noisy(picture(0), 20), "new": picture(7)}
    found = memorised(list(drawn), of(list(drawn.values())), of(burst))
    assert [item.copied for item in found.nearest] == [True, False]
    alone = memorised(list(drawn), of(list(drawn.values())), of([picture(0)]))
    assert (found.hash, found.latents) == (alone.hash, alone.latents)
    twice = memorised(["copy"], of([drawn["copy"]]), of([picture(0)] * shots))
    assert twice.copies == 1


def test_a_burst_beside_other_photos_does_not_shrink_their_distance() -> None:
    others = [picture(seed) for seed in range(1, 4)]
    burst = [noisy(picture(0), seed) for seed in range(6)]
    found = memorised(["copy"], of([noisy(others[0])]), of(others + burst))
    plain = memorised(["copy"], of([noisy(others[0])]), of([*others, burst[0]]))
    assert found.copies == plain.copies == 1
    assert found.hash == plain.hash
    assert (found.hash, found.latents) == (plain.hash, plain.latents)


def test_the_distances_are_those_of_each_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one, from the latents and hashes themselves; the values of an image in several parts."""
    monkeypatch.setattr(memorisation, "TOGETHER", 50)
    photos, drawn = [picture(seed) for seed in range(6)], [picture(70), noisy(picture(2)), picture(2)]
    spaces, own, spread = latents(photos), latents(drawn), float(latents(photos).std())
    found = memorised(["a", "b", "c"], of(drawn), of(photos))
    for number, item in enumerate(found.nearest):
        sides = (spaces[item.photo], spaces[item.photo].flip(-1))
        apart = min(float((own[number] - side).square().mean().sqrt()) for side in sides) / spread
        faces = (photos[item.photo], ImageOps.mirror(photos[item.photo]))
        bits = min(float((difference_hash(drawn[number]) != difference_hash(face)).mean()) for face in faces)
        assert (item.latents, item.hash) == (pytest.approx(apart, abs=1e-4), pytest.approx(bits, abs=1e-4))
    assert found.nearest[2].latents == 0.0
    others = [sorted(float((one - other).square().mean().sqrt()) / spread for other in spaces)[1] for one in spaces]
    assert found.latents == pytest.approx(float(np.median(others)), abs=1e-4)


def test_no_image_is_kept() -> None:
    """2,000 photos of 1,024 pixels would be 8 GB."""
    alive: list[weakref.ref[Image.Image]] = []

    def images() -> Iterator[tuple[Image.Image, Tensor]]:
        for seed in range(4):
            image = picture(seed)
            assert sum(each() is not None for each in alive) <= 1
            alive.append(weakref.ref(image))
            yield image, latents([image])[0]

    assert photo_latents(images()).hashes.shape == (4, 64)
