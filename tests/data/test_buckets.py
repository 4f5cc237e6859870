"""Buckets: the table and the assignment against brute force, epochs by counting, and a training that resumes."""

from __future__ import annotations

import json
import math
import random
from collections import Counter, defaultdict
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from ends import resumed_is
from PIL import Image

from finetune.config.load import parse_recipe
from finetune.core.batch import Batch, Latents
from finetune.core.errors import BadInput
from finetune.core.processes import Processes
from finetune.data.batches import Batches
from finetune.data.buckets import bucket_table, cut_away, nearest_bucket
from finetune.data.crops import Crop, make_crops
from finetune.data.decoding import open_image
from finetune.data.photos import Photo, scan
from finetune.data.samplers import BucketSampler, Sample
from finetune.families.registry import FAMILIES
from finetune.families.sdxl import time_ids
from finetune.families.source import load_family
from finetune.jobs import train as job
from finetune.jobs.plan import plan
from finetune.jobs.prepare import prepare
from finetune.runs.plan import plan_rows

# the table


@pytest.mark.parametrize("tolerance", [0.0, 0.03, 0.1, 0.5])
@pytest.mark.parametrize("multiple", [4, 8, 32, 64])
@pytest.mark.parametrize("cells", [1, 2, 5, 8, 16, 24])
def test_the_table_is_what_its_rules_give(cells: int, multiple: int, tolerance: float) -> None:
    side = cells * multiple
    table = bucket_table(side, multiple, tolerance)
    assert (side, side) in table
    assert len(set(table)) == len(table)
    assert [w / h for w, h in table] == sorted(w / h for w, h in table)
    assert {(h, w) for w, h in table} == set(table)
    for w, h in table:
        assert w % multiple == h % multiple == 0
        assert side / 2 <= min(w, h) <= max(w, h) <= 2 * side
        assert abs(w * h / side**2 - 1) <= tolerance + 1e-12
    ratios = [Fraction(w, h) for w, h in table]
    assert len(set(ratios)) == len(ratios)
    sides = [k * multiple for k in range(1, 2 * cells + 1) if 2 * k >= cells]
    allowed = [(w, h) for w in sides for h in sides if abs(w * h - side**2) <= tolerance * side**2 + 1e-9]
    assert set(table) <= set(allowed)
    for w, h in allowed:  # each is there, or one of its aspect ratio that is at least as near
        there = table[ratios.index(Fraction(w, h))]
        assert abs(there[0] * there[1] - side**2) <= abs(w * h - side**2)


def test_the_tables_of_the_real_bases() -> None:
    """Sizes that trainers of SD1 at 512 and of SDXL at 1024 pixels are known to use."""
    assert bucket_table(512, 64, 0.04) == [
        (256, 1024), (320, 832), (384, 704), (448, 576), (512, 512), (576, 448), (704, 384), (832, 320), (1024, 256),
    ]  # fmt: skip
    assert {(448, 640), (384, 640), (640, 448)} <= set(bucket_table(512, 64))
    assert {(832, 1216), (896, 1152), (1152, 896), (1216, 832), (768, 1344)} <= set(bucket_table(1024, 32))


def test_assignment_is_minimal_and_loses_least() -> None:
    rng = random.Random(0)
    for _ in range(300):
        multiple = rng.choice([4, 32, 64])
        table = bucket_table(multiple * rng.randint(2, 20), multiple, rng.choice([0.05, 0.1, 0.3]))
        size = rng.randint(20, 4000), rng.randint(20, 4000)
        bucket = nearest_bucket(size, table)
        apart = {b: abs(math.log(size[0] / size[1]) - math.log(b[0] / b[1])) for b in table}
        assert apart[bucket] == pytest.approx(min(apart.values()), abs=1e-12)
        scale = max(bucket[0] / size[0], bucket[1] / size[1])
        kept = bucket[0] * bucket[1] / (size[0] * scale * size[1] * scale)
        assert cut_away(size, bucket) == pytest.approx(1 - kept, abs=1e-12)


def test_a_tie_goes_to_the_squarer_bucket_whatever_the_tables_order() -> None:
    """6:1 lies between 4:1 and 9:1; a square lies between 4:5 and 5:4, where the first wins."""
    for table in ([(20, 20), (20, 5), (30, 7), (45, 5)], [(45, 5), (30, 7), (20, 5), (20, 20)]):
        assert nearest_bucket((60, 10), [b for b in table if b != (30, 7)]) == (20, 5)
    assert nearest_bucket((10, 10), [(4, 5), (5, 4)]) == (4, 5)


# views


@pytest.mark.parametrize("size", [(640, 480), (481, 999), (100, 37), (2000, 151), (33, 33)])
@pytest.mark.parametrize("target", [(64, 64), (96, 40), (40, 96)])
def test_a_view_covers_its_bucket(size: tuple[int, int], target: tuple[int, int]) -> None:
    for view in make_crops(Photo(Path("x.png"), size, "d"), target, "random", 5, True, 1):
        assert view.resized[0] == target[0] or view.resized[1] == target[1]
        assert view.resized[0] / view.resized[1] == pytest.approx(size[0] / size[1], rel=1 / min(target))
        top, left = view.geometry.crop
        assert 0 <= left <= view.resized[0] - target[0]
        assert 0 <= top <= view.resized[1] - target[1]
        assert view.geometry.original == (size[1], size[0])
        assert view.geometry.target == (target[1], target[0])


def test_pixels_and_time_ids_of_a_crop_and_its_mirror(tmp_path: Path) -> None:
    """Against Pillow: the photo resized, mirrored as a whole, and cropped where the geometry says."""
    noise = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    (photo,) = scan(tmp_path)
    made = make_crops(photo, (24, 20), "random", 3, True, 0)
    assert {view.flip for view in made} == {False, True}
    for view in made:
        shown = open_image(photo.path).resize((36, 20), Image.Resampling.LANCZOS)
        shown = shown.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flip else shown
        top, left = view.geometry.crop
        assert np.array_equal(np.asarray(view.image()), np.asarray(shown.crop((left, top, left + 24, top + 20))))
        assert view.pixels().shape == (3, 20, 24)
        assert time_ids([view.geometry]).tolist() == [[50, 90, top, left, 20, 24]]
    assert len({view.key for view in [*made, *make_crops(photo, (20, 24), "random", 3, True, 0)]}) == 2 * len(made)


def test_keys_of_squares_are_those_of_before() -> None:
    """As the version before buckets made them: its caches stay good."""
    (view,) = make_crops(Photo(Path("x.png"), (300, 100), "d"), 64, "center", 1, False, 0)
    assert view.key == "b8dc54fe7df36480049d4f41bd7e99df77671cfa6a9c6591f472c1f7f21b84f8"


# the order


class ByShape:
    """Latents of the view's own shape, of its photo's number."""

    def conditions(self, view: Crop) -> dict[str, torch.Tensor]:
        return {}

    def latents(self, view: Crop) -> Latents:
        value = torch.full((1, view.size[1] // 4, view.size[0] // 4), float(view.photo.digest))
        return Latents(value, torch.zeros_like(value))


def stream(sizes: list[tuple[int, int]], first: int = 0, weight: float = 1.0) -> list[Sample]:
    """One sample for each size; a photo's number is its digest."""
    photos = [Photo(Path(f"{k}.png"), size, str(k)) for k, size in enumerate(sizes, first)]
    return [
        Sample(make_crops(p, s, "center", 1, True, 0), [p.digest], weight, 0.0, p.digest)
        for p, s in zip(photos, sizes, strict=True)
    ]


def classes(count: int, sizes: list[tuple[int, int]], weight: float) -> list[Sample]:
    photos = [Photo(Path(f"c{k}.png"), (32, 32), str(k)) for k in range(1000, 1000 + count)]
    return [
        Sample([v for s in sizes for v in make_crops(p, s, "center", 1, True, 0)], [p.digest], weight, 0.0, p.digest)
        for p in photos
    ]


TABLE = bucket_table(32, 4)


def some_sizes(rng: random.Random) -> list[tuple[int, int]]:
    few = rng.sample(TABLE, rng.randint(1, 5))
    return [rng.choice(few) for _ in range(rng.randint(1, 20))]


def made(streams: list[list[Sample]], seed: int, batch_size: int, accumulate: int = 1, *place: int) -> Batches:
    return Batches(BucketSampler(streams, seed, batch_size), ByShape(), accumulate, Processes(*place))


@pytest.mark.parametrize("seed", range(12))
def test_every_photo_counts_once_an_epoch_and_no_batch_is_mixed(seed: int) -> None:
    rng = random.Random(seed)
    sizes, batch_size = some_sizes(rng), rng.choice([1, 2, 3, 4, 8])
    batches = made([stream(sizes, weight=0.7)], seed, batch_size)
    steps = sum(math.ceil(n / batch_size) for n in Counter(sizes).values())
    orders = []
    for epoch in range(3):
        counted: Counter[str] = Counter()
        order = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            batch = batches.micro(step, 0)
            assert len(batch) == batch_size == batches.samples_per_step
            assert len({sizes[int(name)] for name in batch.names}) == 1
            height, width = batch.geometry[0].target
            assert batch.latents.mean.shape[2:] == (height // 4, width // 4)
            weights = dict(zip(batch.names, batch.weight.tolist(), strict=False))
            assert {*weights} == {*batch.names}
            for name, weight in zip(batch.names, batch.weight.tolist(), strict=True):
                assert weight in (0.0, pytest.approx(0.7))
                counted[name] += weight > 0
            order.append(tuple(batch.names))
        assert counted == Counter({str(k): 1 for k in range(len(sizes))})
        orders.append(tuple(order))
    if len(sizes) > 6:
        assert len(set(orders)) == 3


def test_groups_of_a_large_bucket_change_between_epochs() -> None:
    """The photos that share a batch are drawn anew each epoch, and so is the order of the buckets."""
    sizes = [(32, 32)] * 8 + [(28, 36)] * 8
    batches = made([stream(sizes)], 0, 4)
    epochs = [[frozenset(batches.micro(4 * e + k, 0).names) for k in range(4)] for e in range(10)]
    assert len({group for epoch in epochs for group in epoch}) > 20
    assert len({tuple(min(map(int, group)) < 8 for group in epoch) for epoch in epochs}) > 2


def test_class_images_take_the_steps_shape_and_keep_their_own_order() -> None:
    sizes = [(32, 32), (28, 36), (28, 36), (64, 16), (32, 32)]
    streams = [stream(sizes), classes(7, sorted(set(sizes)), 0.5)]
    batches = made(streams, 3, 2)
    assert batches.samples_per_step == 4
    names: list[str] = []
    for step in range(21):
        batch = batches.micro(step, 0)
        assert {g.target for g in batch.geometry} == {sizes[int(batch.names[0])][::-1]}
        counts = (batch.weight[::2] > 0).float()
        assert torch.equal(batch.weight[1::2], counts)  # lambda 0.5 in two streams, beside a photo that counts
        names += batch.names[1::2]
    for start in range(0, len(names), 7):
        assert len(set(names[start : start + 7])) == 7
    flips = {(g.crop, g.target) for step in range(21) for g in batches.micro(step, 0).geometry}
    assert len(flips) > 3


def rows(batches: list[Batch]) -> list[tuple]:
    return [
        (draw, name, prompt, float(weight), place, tuple(mean.shape))
        for b in batches
        for draw, name, prompt, weight, place, mean in zip(
            b.keys, b.names, b.prompts, b.weight, b.geometry, b.latents.mean, strict=True
        )
    ]


@pytest.mark.parametrize(("accumulate", "world"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_any_cut_of_a_step_is_the_same_samples(accumulate: int, world: int) -> None:
    rng = random.Random(5)
    sizes = some_sizes(rng)
    streams = [stream(sizes), classes(5, sorted(set(sizes)), 0.3)]
    whole = made(streams, 9, 4)
    ranks = [made(streams, 9, 4, accumulate, rank, world) for rank in range(world)]
    for step in (0, 1, 7, 100):
        cut = [ranks[rank].micro(step, index) for index in range(accumulate) for rank in range(world)]
        assert rows(cut) == rows([whole.micro(step, 0)])


def test_an_epochs_sum_is_every_photos_error_once() -> None:
    """Sum over an epoch of B * mean(weight * error): each photo's error once, however full the groups are."""
    sizes = [(32, 32)] * 5 + [(28, 36)] * 2 + [(64, 16)]
    batches = made([stream(sizes)], 1, 4)
    errors = torch.rand(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    total = 0.0
    for step in range(4):
        batch = batches.micro(step, 0)
        total += float((errors[[int(name) for name in batch.names]] * batch.weight).mean()) * 4
    assert total == pytest.approx(float(errors.sum()))


# the whole job


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """Square, wide (two), tall and very wide photos."""
    folder = tmp_path / "shapes"
    folder.mkdir()
    sizes = {"square": (40, 40), "wide": (60, 40), "wider": (66, 44), "tall": (40, 64), "strip": (300, 30)}
    for index, (name, size) in enumerate(sizes.items()):
        noise = np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{name}.png")
    return folder


def recipe(base: Path, photos: Path, *overrides: str) -> object:
    return parse_recipe(
        {
            "base": str(base),
            "data": {"photos": str(photos), "class_noun": "mug", "shape": "buckets", "crop": "random", "crops": 2},
            "prior": {"kind": "class_images", "count": 3, "steps": 1},
            "method": {"kind": "lora", "rank": 2},
            "optim": {"kind": "adamw", "lr": 1e-3},
            "run": {"steps": 6, "checkpoint_every": 2, "batch_size": 2},
            "sample": {"count": 1, "steps": 1, "prompts": ["a {noun}"]},
        },
        list(overrides),
    )


def test_the_step_of_a_bucket_is_the_familys_own(tiny_bases: dict[str, Path]) -> None:
    """64 pixels for SD1 (four blocks), 32 for SDXL (three); the small bases: 2 per latent, one halving."""
    for name, base in tiny_bases.items():
        family = load_family(str(base))
        assert family.size_multiple == 4, name
        if FAMILIES[name].naming.joined:  # tokens are patches of 2x2 latents
            assert family.size_multiple == 2 * family.codec.factor == family.square_multiple
            continue
        halvings = sum(block.downsamplers is not None for block in family.parts["denoiser"].down_blocks)
        assert family.size_multiple == family.codec.factor * 2**halvings


def test_the_plan_tells_of_buckets(tiny_bases: dict[str, Path], shapes: Path) -> None:
    told = plan_rows(plan(prepare(recipe(tiny_bases["sd1"], shapes, "run.steps=40"))))
    assert told["buckets"] == (
        "24x40: 1 photo; 32x32: 1 photo; 40x28: 2 photos; 64x16: 1 photo; "
        "at most 60% of a photo (strip.png) is cut away"
    )
    assert told["padding"] == "3 of 8 samples of an epoch are repeats with weight 0"
    assert told["each photo"] == "seen 10 times"  # 40 steps, 4 an epoch
    assert "enlarged" not in told
    told = plan_rows(plan(prepare(recipe(tiny_bases["sd1"], shapes, "data.resolution=64"))))
    assert told["enlarged"] == "5 of 5 photos are enlarged to fill their bucket (the smallest, strip.png, is 300x30)"


def test_the_plan_tells_what_a_square_cuts_away(tiny_bases: dict[str, Path], shapes: Path) -> None:
    told = plan_rows(plan(prepare(recipe(tiny_bases["sd1"], shapes, "data.shape=square"))))
    assert told["cropped"] == (
        "up to 90% of a photo (strip.png) is cut away by the square crop: "
        "data.shape=buckets would cut away at most 60%"
    )
    assert "buckets" not in told
    for name in ("strip", "tall", "wide", "wider"):
        (shapes / f"{name}.png").unlink()
    assert "cropped" not in plan_rows(plan(prepare(recipe(tiny_bases["sd1"], shapes, "data.shape=square"))))


def test_an_extreme_photo_is_cropped_into_the_last_bucket(tiny_bases: dict[str, Path], shapes: Path) -> None:
    found = prepare(recipe(tiny_bases["sd1"], shapes))
    size = dict(zip([photo.path.stem for photo in found.photos], found.sizes, strict=True))["strip"]
    assert size == bucket_table(32, 4)[-1] == (64, 16)


def test_a_resolution_that_buckets_cannot_have_is_refused(tiny_bases: dict[str, Path], shapes: Path) -> None:
    prepare(recipe(tiny_bases["sd1"], shapes, "data.resolution=34", "data.shape=square"))
    with pytest.raises(BadInput, match=r"is 34, .* multiple of 4 \(with data\.shape=buckets\): choose 32"):
        prepare(recipe(tiny_bases["sd1"], shapes, "data.resolution=34"))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.slow
def test_a_stopped_job_with_buckets_goes_on_to_the_same_weights(
    family: str, tiny_bases: dict[str, Path], shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the fourth of six steps; the denoiser meets each bucket's own latent shape, class images too."""
    met = defaultdict(set)
    kind = FAMILIES[family]
    predict = kind.predict

    def watched(self: object, noisy: torch.Tensor, t: object, cond: object, geometry: list) -> torch.Tensor:
        met[noisy.shape[0]].add((tuple(noisy.shape[2:]), *{g.target for g in geometry}))
        return predict(self, noisy, t, cond, geometry)

    monkeypatch.setattr(kind, "predict", watched)
    wanted = recipe(tiny_bases[family], shapes)
    whole = job.train(wanted, tmp_path / "whole")
    assert met[4] == {((h // 2, w // 2), (h, w)) for w, h in [(24, 40), (32, 32), (40, 28), (64, 16)]}
    monkeypatch.undo()
    resumed_is(whole, wanted, tmp_path / "stopped", 4)
    assert "24x40: 1 photo" in json.loads((whole / "run.json").read_text())["plan"]["buckets"]
