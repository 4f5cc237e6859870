"""Contract tests for families (`families/base.py`), as plain functions of a small base folder.

tests/contract runs them for all built-in families. A package that adds a family can run them for its own. Each raises
AssertionError if the contract is broken.
"""

from __future__ import annotations

from pathlib import Path

import torch

from finetune.core.batch import Geometry
from finetune.core.errors import BadInput
from finetune.families.base import Family
from finetune.families.registry import family_of
from finetune.families.source import load_family
from finetune.sampling.draw import draw
from finetune.sampling.settings import Sampling
from finetune.testing.contract import predict, weights

PROMPTS = ["a photo of a dog", "a red mug on the beach", ""]


def it_is_frozen_and_knows_itself(base: Path) -> None:
    """Loaded parts are frozen, in eval mode and match their configs; every trainable part has a skeleton."""
    family, kind = load_family(str(base)), family_of(base)
    assert isinstance(family, kind)
    assert not any(p.requires_grad for part in family.parts.values() for p in part.parameters()), (
        "a part is not frozen"
    )
    assert not any(part.training for part in family.parts.values()), "a part is not in eval mode"
    skeletons = kind.skeletons(base)
    assert skeletons.keys() <= set(kind.trainable_parts())
    for name, skeleton in skeletons.items():
        wanted = {key: value.shape for key, value in family.parts[name].state_dict().items()}
        assert {key: value.shape for key, value in skeleton.state_dict().items()} == wanted, name
    assert kind.resolution_of(base) == family.resolution


def images_become_latents_and_images(base: Path) -> None:
    """The codec's latents and images have the right shapes and are finite; the other images in a batch change
    nothing."""
    family = load_family(str(base))
    side, codec = 2 * family.size_multiple, family.codec
    pixels = torch.rand(2, 3, side, 2 * side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = codec.encode(pixels)
    wanted = (2, codec.channels, side // codec.factor, 2 * side // codec.factor)
    assert latents.mean.shape == latents.std.shape == wanted
    assert latents.mean.dtype == latents.std.dtype == torch.float32
    assert bool((latents.std >= 0).all() and torch.isfinite(latents.mean).all())
    assert codec.decode(latents.mean).shape == pixels.shape
    assert not latents.mean.requires_grad


def prompts_can_be_cached(base: Path) -> None:
    """Encoding each prompt with each encoder separately and joining the outputs equals encoding all together. Dropped
    encoders return zeros."""
    family = load_family(str(base))
    together = family.encode_prompts(PROMPTS)
    rows = [[family.encode_text(n, [prompt]) for prompt in PROMPTS] for n in range(len(family.text_encoders))]
    encoded = [{name: torch.cat([row[name] for row in each]) for name in each[0]} for each in rows]
    joined = family.join_texts(encoded)
    assert joined.keys() == together.keys()
    for name, value in together.items():
        assert len(value) == len(PROMPTS)
        assert torch.allclose(joined[name], value, atol=1e-5), f"{name} depends on the other prompts"
    dropped = family.encode_prompts(PROMPTS, torch.zeros(len(family.text_encoders), len(PROMPTS)))
    texts = dropped.keys() - family.blank_image_conditions(1).keys()
    assert all(not dropped[name].any() for name in texts), "the output of a dropped encoder is not zero"


def the_prediction_is_of_the_latents_shape(base: Path) -> None:
    """The prediction has the latents' shape for square and other images. It depends on the prompt, but not on the
    other samples."""
    family = load_family(str(base))
    step = family.size_multiple // family.codec.factor
    for height, width in ((2 * step, 2 * step), (2 * step, 3 * step)):
        noisy = torch.randn(2, family.codec.channels, height, width, generator=torch.Generator().manual_seed(1))
        pixels = (height * family.codec.factor, width * family.codec.factor)
        geometry, t = [Geometry(pixels, (0, 0), pixels)] * 2, torch.tensor([100, 900])
        with torch.no_grad():
            cond, other = family.encode_prompts(PROMPTS[:2]), family.encode_prompts(PROMPTS[1:])
            both = family.predict(noisy, t, cond, geometry)
            alone = family.predict(noisy[:1], t[:1], {name: v[:1] for name, v in cond.items()}, geometry[:1])
            assert both.shape == noisy.shape
            assert torch.allclose(both[:1], alone, atol=1e-4), "a sample depends on another sample of its batch"
            assert not torch.equal(both, family.predict(noisy, t, other, geometry)), "the prompt changes nothing"


def released_parts_come_back(base: Path) -> None:
    """Released parts are loaded again bit for bit. While they are released, the family's properties still work."""
    family = load_family(str(base))
    before, known = weights(family), _questions(family)
    for waits_in_memory in (False, True):
        family.parts.keep_released = waits_in_memory
        family.parts.release(list(family.parts))
        assert bool(weights(family)) == waits_in_memory
        assert _questions(family) == known, "a property of the family changed when its parts were released"
        family.parts.restore()
        after = weights(family)
        assert before.keys() == after.keys()
        assert all(torch.equal(after[name], value) for name, value in before.items())


def it_draws(base: Path) -> None:
    """The pipeline draws images of the requested size; the same seed draws the same image; an unknown sampler is
    refused."""
    family = load_family(str(base))
    first, second, other = (_drawn(family, seed) for seed in (1, 1, 2))
    assert first == second, "the same seed drew different images"
    assert first != other, "different seeds drew the same image"
    try:
        family.drawing.check_sampler("no such sampler")
    except BadInput:
        return
    raise AssertionError("a sampler that does not exist was accepted")


def on_meta_it_counts_the_same(base: Path) -> None:
    """On the meta device the family has the same parts, numbers of parameters and LoRA targets."""
    family, counted = load_family(str(base)), family_of(base).on_meta(base, torch.float32)
    assert {name: _count(counted, name) for name in counted.parts} == {n: _count(family, n) for n in family.parts}
    assert counted.lora_targets("denoiser", "all-linear") == family.lora_targets("denoiser", "all-linear")
    assert torch.equal(predict(family), predict(family)), "two predictions from the same inputs differ"


FAMILY_CONTRACT = (
    it_is_frozen_and_knows_itself,
    images_become_latents_and_images,
    prompts_can_be_cached,
    the_prediction_is_of_the_latents_shape,
    released_parts_come_back,
    it_draws,
    on_meta_it_counts_the_same,
)


def _questions(family: Family) -> tuple[object, ...]:
    lengths = [family.text_length(n) for n in range(len(family.text_encoders))]
    dtypes = [family.parts.dtype(name) for name in family.parts]
    sizes = (family.size_multiple, family.square_multiple, family.resolution, family.shift(family.resolution))
    return (family.text_encoders, lengths, dtypes, sizes, family.codec.factor, family.codec.channels)


def _drawn(family: Family, seed: int) -> bytes:
    image = draw(family, PROMPTS[:1], Sampling(steps=2), seeds=[seed])[0]
    assert image.size == (family.resolution, family.resolution)
    return image.tobytes()


def _count(family: Family, part: str) -> int:
    return sum(p.numel() for p in family.parts[part].parameters())
