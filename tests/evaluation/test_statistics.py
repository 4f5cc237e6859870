"""The arithmetic of the metrics against closed forms and plain loops."""

from __future__ import annotations

import math
from itertools import combinations, permutations, product

import numpy as np
import pytest

from finetune.evaluation.base import Prompt, Seen
from finetune.evaluation.registry import METRICS
from finetune.evaluation.statistics import among, frechet, interval

RNG = np.random.default_rng(0)
PHOTOS = RNG.standard_normal((3, 5))
SUBJECT = [RNG.standard_normal((count, 5)) for count in (4, 2, 1)]
CLASS = RNG.standard_normal((6, 5))
TEXTS = RNG.standard_normal((4, 5))
PROMPTS = [*(Prompt(f"a zwx dog {k}", f"a dog {k}") for k in range(3)), Prompt("a dog", "a dog", "class")]
SEEN = Seen(PROMPTS, [*SUBJECT, CLASS], PHOTOS, TEXTS)


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True)) / math.sqrt(sum(one**2) * sum(other**2))


def squared(one: np.ndarray, other: np.ndarray) -> float:
    return sum((a - b) ** 2 for a, b in zip(one, other, strict=True))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def score(name: str, seen: Seen = SEEN) -> float:
    value = METRICS[name]().score(seen).value
    assert value is not None
    return value


@pytest.mark.parametrize("name", ["dino", "dinov2", "dinov3", "clip_i", "csd"])
def test_likeness_is_the_mean_cosine_of_each_prompt_with_the_photos(name: str) -> None:
    by_hand = mean([mean([cosine(i, p) for i, p in product(own, PHOTOS)]) for own in SUBJECT])
    assert score(name) == pytest.approx(by_hand, abs=1e-12)
    between = mean([cosine(a, b) for a, b in combinations(PHOTOS, 2)])
    assert METRICS[name]().reference(PHOTOS) == pytest.approx(between, abs=1e-12)
    assert METRICS[name]().reference(PHOTOS[:1]) is None


def test_obedience_compares_with_the_own_prompt_alone() -> None:
    by_hand = mean([mean([cosine(i, TEXTS[k]) for i in own]) for k, own in enumerate(SUBJECT)])
    assert score("clip_t") == pytest.approx(by_hand, abs=1e-12)


def test_pres_looks_at_the_class_alone_and_resamples_its_images() -> None:
    found = METRICS["pres"]().score(SEEN)
    each = [mean([cosine(i, p) for p in PHOTOS]) for i in CLASS]
    assert found.value == pytest.approx(mean(each), abs=1e-12)
    assert (found.low, found.high) == pytest.approx(interval(each))
    without = Seen(PROMPTS[:3], SUBJECT, PHOTOS, TEXTS[:3])
    nothing = METRICS["pres"]().score(without)
    assert nothing.value is None
    assert "class alone" in nothing.note


def test_diversity_is_of_images_of_one_prompt_and_leaves_out_single_ones() -> None:
    pairs = [[(a, b) for a, b in combinations(own, 2)] for own in SUBJECT if len(own) > 1]
    assert score("div") == pytest.approx(mean([mean([squared(a, b) for a, b in own]) for own in pairs]), abs=1e-12)
    by_cosine = mean([mean([1 - cosine(a, b) for a, b in own]) for own in pairs])
    assert score("div_dino") == pytest.approx(by_cosine, abs=1e-12)
    single = METRICS["div"]().score(Seen(PROMPTS[:1], [SUBJECT[2]], PHOTOS))
    assert single.value is None
    assert "2 images" in single.note


def test_copies_are_told_by_the_nearest_photo() -> None:
    nearest = [[max(cosine(i, p) for p in PHOTOS) for i in own] for own in SUBJECT]
    found = METRICS["copies"]().score(SEEN)
    assert found.value == pytest.approx(mean([mean(own) for own in nearest]), abs=1e-12)
    flat = [value for own in nearest for value in own]
    assert found.extra["share above 0.5"] == mean([float(value > 0.5) for value in flat])
    other = [max(cosine(PHOTOS[a], PHOTOS[b]) for b in range(3) if a != b) for a in range(3)]
    assert METRICS["copies"]().reference(PHOTOS) == pytest.approx(mean(other), abs=1e-12)


def test_gram_is_the_mean_squared_distance_to_the_drawings() -> None:
    by_hand = mean([mean([squared(i, p) for i, p in product(own, PHOTOS)]) for own in SUBJECT])
    assert score("gram") == pytest.approx(by_hand, abs=1e-12)


def test_kid_is_the_double_sum_without_the_diagonal() -> None:
    images = np.concatenate(SUBJECT)

    def kernel(one: np.ndarray, other: np.ndarray) -> float:
        return (float(one @ other) / 5 + 1) ** 3

    own = mean([kernel(a, b) for a, b in permutations(images, 2)])
    photos = mean([kernel(a, b) for a, b in permutations(PHOTOS, 2)])
    across = mean([kernel(a, b) for a, b in product(images, PHOTOS)])
    found = METRICS["kid"]().score(SEEN)
    assert found.value == pytest.approx(own + photos - 2 * across, abs=1e-10)
    assert (found.low, found.high) == (None, None)  # of three prompts, as of every other metric


def test_kid_has_an_interval_over_five_prompts() -> None:
    prompts = [Prompt(f"a zwx dog {k}", f"a dog {k}") for k in range(5)]
    found = METRICS["kid"]().score(Seen(prompts, [*SUBJECT, *SUBJECT[:2]], PHOTOS))
    assert found.low is not None
    assert found.high is not None
    assert found.value is not None
    assert found.low < found.value < found.high
    fewer = METRICS["kid"]().score(Seen(prompts[:4], [*SUBJECT, SUBJECT[0]], PHOTOS))
    assert (fewer.low, fewer.high) == (None, None)


def test_kid_of_one_distribution_is_zero_on_average() -> None:
    values = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        sets = [rng.standard_normal((4, 3)) for _ in range(3)]
        values.append(score("kid", Seen(PROMPTS[:2], sets[:2], sets[2])))
    assert abs(mean(values)) < 3 * float(np.std(values)) / math.sqrt(len(values))


@pytest.mark.parametrize("count", [40, 3])  # more images than numbers, and fewer
def test_fid_is_the_distance_of_two_gaussians(count: int) -> None:
    width = 6
    one, other = RNG.standard_normal((count, width)), 2 * RNG.standard_normal((count + 1, width)) + 1
    first, second = np.cov(one.T), np.cov(other.T)
    values, vectors = np.linalg.eigh(first)
    root = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
    mixed = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    by_hand = ((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * mixed
    assert frechet(one, other) == pytest.approx(by_hand, rel=1e-6)


def test_fid_of_scaled_and_moved_images_is_known() -> None:
    """Of x and a x + b: |m - (a m + b)|^2 + (1 - a)^2 tr C."""
    images = RNG.standard_normal((50, 4))
    moved = 3 * images + 2
    centre = ((images.mean(0) - moved.mean(0)) ** 2).sum()
    assert frechet(images, moved) == pytest.approx(centre + 4 * np.trace(np.cov(images.T)), rel=1e-9)
    found = METRICS["fid"]().score(Seen(PROMPTS[:1], [images], moved))
    assert found.value == pytest.approx(frechet(images, moved))
    assert "biased" in found.note
    assert found.low is None


def test_sets_that_are_too_small_have_no_distance() -> None:
    for name in ("kid", "fid"):
        found = METRICS[name]().score(Seen(PROMPTS[:1], [SUBJECT[2]], PHOTOS))
        assert found.value is None
        assert "two images" in found.note


def test_the_interval_holds_the_mean_as_often_as_it_says() -> None:
    """Of samples of 25 from a known distribution, about 95 % (the percentile bootstrap: a little less)."""
    inside = 0
    for seed in range(200):
        low, high = interval(list(np.random.default_rng(seed).normal(1.0, 2.0, 25))) or (0.0, 0.0)
        inside += low <= 1.0 <= high
    assert 0.88 <= inside / 200 <= 0.99
    assert interval([2.0] * 5) == (2.0, 2.0)


def test_few_values_have_no_interval() -> None:
    """That of two is the two values, and holds the true mean half of the time."""
    assert [interval([1.0, 2.0, 4.0, 3.0, 5.0][:count]) is None for count in range(1, 6)] == [True] * 4 + [False]


def test_pairs_of_one_are_none() -> None:
    assert among(np.ones((1, 1))) is None
    assert among(np.array([[1.0, 3.0], [3.0, 1.0]])) == 3.0
