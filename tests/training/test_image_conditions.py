"""Conditions that are made of the training image itself, as unCLIP's image embedding is: a family that has them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from finetune.core.batch import Batch, Geometry
from finetune.core.rng import SampleKey
from finetune.data.cache import LatentCache
from finetune.data.crops import Crop, make_crops
from finetune.data.photos import scan
from finetune.families.sd import StableDiffusion1
from finetune.methods.lora import LoRA
from finetune.objectives.registry import build_objective
from finetune.objectives.settings import ObjectiveSettings
from finetune.training.step import Step, parts_of


class Conditioned(StableDiffusion1):
    """SD1 whose tokens are moved by the mean colour of the image."""

    made = 0

    def encode_image_conditions(self, pixels: Tensor) -> dict[str, Tensor]:
        self.made += len(pixels)
        return {"colour": pixels.mean((2, 3))}

    def blank_image_conditions(self, count: int) -> dict[str, Tensor]:
        return {"colour": torch.zeros(count, 3)}

    def predict(
        self, noisy: Tensor, timesteps: Tensor, cond: dict[str, Tensor], geometry: Sequence[Geometry]
    ) -> Tensor:
        moved = cond["hidden"] + cond["colour"].mean(1)[:, None, None]
        return super().predict(noisy, timesteps, {"hidden": moved}, geometry)


@pytest.fixture
def family(tiny_bases: dict[str, Path]) -> Conditioned:
    loaded = Conditioned.load(tiny_bases["sd1"], torch.float32)
    assert isinstance(loaded, Conditioned)
    return loaded


def crops(photos: Path) -> list[Crop]:
    return [crop for photo in scan(photos) for crop in make_crops(photo, 32, "center", 1, False, 0)]


def batch(cache: LatentCache, chosen: list[Crop]) -> Batch:
    latents = cache.latents(chosen[0])
    return Batch(
        type(latents)(*(torch.stack([getattr(cache.latents(c), n) for c in chosen]) for n in ("mean", "std"))),
        ["a dog"] * len(chosen),
        torch.ones(len(chosen)),
        [c.geometry for c in chosen],
        [SampleKey(0, 0, k) for k in range(len(chosen))],
        ["x"] * len(chosen),
        conditions={"colour": torch.stack([cache.conditions(c)["colour"] for c in chosen])},
    )


def test_they_are_made_once_for_each_image_and_read_from_the_disk(
    family: Conditioned, photos: Path, tmp_path: Path
) -> None:
    wanted = crops(photos)
    for _ in range(2):
        cache = LatentCache(tmp_path / "cache", "base")
        cache.fill(family, wanted)
        for crop in wanted:
            assert torch.equal(cache.conditions(crop)["colour"], crop.pixels().mean((1, 2)))
        assert family.made == len(wanted)


def test_the_step_trains_with_the_images_own_and_blank_ones_stand_elsewhere(
    family: Conditioned, photos: Path, tmp_path: Path
) -> None:
    cache = LatentCache(tmp_path / "cache", "base")
    wanted = crops(photos)
    cache.fill(family, wanted)
    trained = LoRA(rank=2).attach(family, 0)
    step = Step(
        family, parts_of(trained), build_objective(ObjectiveSettings(), family.schedule), family.encode_prompts
    )
    seen: list[Tensor] = []
    honest = family.predict

    def watching(noisy: Tensor, t: Tensor, cond: dict[str, Tensor], geometry: Sequence[Geometry]) -> Tensor:
        seen.append(cond["colour"])
        return honest(noisy, t, cond, geometry)

    family.predict = watching  # type: ignore[method-assign]
    loss = step(batch(cache, wanted))
    assert torch.equal(seen[0], torch.stack([crop.pixels().mean((1, 2)) for crop in wanted]))
    assert torch.equal(family.encode_prompts(["a dog"])["colour"], torch.zeros(1, 3))
    other = step(batch(cache, wanted[::-1]))
    assert not torch.equal(loss, other)
