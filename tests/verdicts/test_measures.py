"""Each measure against its formula on real components, for every family and method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from finetune.core.batch import Batch, Geometry, Latents
from finetune.core.rng import SampleKey
from finetune.families.base import Family
from finetune.families.registry import FAMILIES
from finetune.families.source import load_family
from finetune.methods.lora import LoRA
from finetune.methods.registry import METHODS
from finetune.objectives.densities import Uniform
from finetune.objectives.registry import build_objective
from finetune.objectives.settings import ObjectiveSettings
from finetune.testing.contract import attached, train_a_little
from finetune.verdicts.bank import Bank, Canvas
from finetune.verdicts.base import CLASS, DRAWN, ELSEWHERE, PHOTOS, SUBJECT, Look, share_of_way
from finetune.verdicts.points import Point, Predictor, of_batch
from finetune.verdicts.probe import BaseProbe, Material, known_prompts, make_sets, neutral_prompts
from finetune.verdicts.registry import MEASURES

SIDE = 32
USUAL = [("sd1", "lora"), ("sd1", "full"), ("sd1", "textual_inversion"), ("flux", "lora")]
CASES = [
    pytest.param(family, kind, marks=() if (family, kind) in USUAL else pytest.mark.slow)
    for family in FAMILIES
    for kind in METHODS
    if family == "sd1" or kind == "lora"
]


def photo_points(family: Family, seed: int, word: str) -> list[Point]:
    made = torch.Generator().manual_seed(seed)
    mean = torch.randn(2, family.codec.channels, 16, 16, generator=made)
    keys = [SampleKey(0, -1, n) for n in range(2)]
    batch = Batch(
        Latents(mean, torch.zeros_like(mean)), [f"a photo of a {word} mug"] * 2, torch.ones(2),
        [Geometry((40, 48), (0, 4), (32, 32))] * 2, keys, ["a", "b"],
    )  # fmt: skip
    objective = build_objective(ObjectiveSettings(), family.schedule, family.shift(SIDE))
    return of_batch(batch, objective, torch.tensor([0.25, 0.75]) * family.timestep_fraction, keys)


def probe_of(family: Family, cache: Path, word: str = "zwx", classes: bool = True) -> BaseProbe:
    predict = Predictor(family, family.encode_prompts, 8)
    objective = build_objective(ObjectiveSettings(density=Uniform()), family.schedule, family.shift(SIDE))
    shape = (family.codec.channels, 16, 16)
    bank = Bank(predict, Canvas(shape, SIDE, objective, family.timestep_fraction), "tiny", cache)
    pairs: Sequence[tuple[str | None, str]] = [("a mug" if classes else None, f"a {word} mug")]
    photos = [photo_points(family, seed, word) for seed in (0, 1)]
    others = ["a red car", "a blue fish"]
    material = Material(photos[0], photos[1], pairs, others, others)
    return BaseProbe(predict, make_sets(material, bank))


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_nothing_has_moved_before_training_and_the_right_things_after(
    name: str, kind: str, tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    family = load_family(str(tiny_bases[name]))
    parts = ["text_encoders"] if kind == "textual_inversion" else ["denoiser"]
    _, trained, word = attached(kind, parts, family)
    probe = probe_of(family, tmp_path, word)
    assert probe.left_out == []
    assert set(probe.values()) == set(MEASURES) - {"prompts_lost"}
    assert all(value == 0 for value in probe.values().values())
    train_a_little(family, trained, word)
    moved = {measure for measure, value in probe.values().items() if value != 0}
    assert {"learned", "held_out", "overfit"} <= moved
    only_the_word = kind == "textual_inversion"  # no other prompt has it, so nothing else can move
    drifts = {"class_drift", "elsewhere", "empty_class", "empty_prompt", "forgotten", "takeover"}
    assert bool(moved & drifts) != only_the_word


def test_the_measures_are_their_formulas(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """The base's predictions are asked anew, from the adapter switched off."""
    family = load_family(str(tiny_bases["sd1"]))
    method = LoRA(rank=2)
    trained = method.attach(family, 0)
    probe = probe_of(family, tmp_path)
    train_a_little(family, trained)
    found = probe.values()

    def outputs(name: str, base: bool, prompt: str | None = None) -> torch.Tensor:
        points = probe.sets[name]
        cond = family.encode_prompts([point.prompt if prompt is None else prompt for point in points])
        noisy, t = (torch.stack([getattr(point, key) for point in points]) for key in ("noisy", "t"))
        with torch.no_grad():
            if not base:
                return family.predict(noisy, t, cond, [point.geometry for point in points])
            with method.disabled(family):
                return family.predict(noisy, t, cond, [point.geometry for point in points])

    def does(name: str, base: bool) -> torch.Tensor:
        return outputs(name, base) - outputs(name, base, "")

    def effect(name: str) -> torch.Tensor:
        return does(name, True).square().mean()

    def close(name: str, value: torch.Tensor, off: float = 1e-6) -> None:
        assert found[name] == pytest.approx(float(value), rel=2e-3, abs=off)

    changed = {name: does(name, False) - does(name, True) for name in (CLASS, ELSEWHERE)}
    for measure, name in (("class_drift", CLASS), ("elsewhere", ELSEWHERE)):
        close(measure, (changed[name].square().mean() / effect(name)).sqrt())
    way = does(SUBJECT, False) - does(CLASS, True)
    close("takeover", (changed[CLASS] * way).mean() / max(way.square().mean(), effect(CLASS)))
    empty = outputs(SUBJECT, False, "") - outputs(SUBJECT, True, "")
    way = outputs(SUBJECT, False) - outputs(SUBJECT, True, "")
    close("empty_prompt", (empty * way).mean() / max(way.square().mean(), effect(SUBJECT)))
    way = outputs(CLASS, True) - outputs(CLASS, True, "")
    close("empty_class", (empty * way).mean() / effect(CLASS))
    target = torch.stack([point.target for point in probe.sets[PHOTOS]])  # type: ignore[misc]
    better = [(outputs(PHOTOS, base) - target).square().mean() for base in (True, False)]
    close("learned", (better[0] - better[1]) / effect(PHOTOS))
    images = torch.stack([point.target for point in probe.sets[DRAWN]])  # type: ignore[misc]
    told = []
    for base in (True, False):
        wrong = [(outputs(DRAWN, base, prompt) - images).double() for prompt in ("", None)]
        told.append((wrong[0].square() - wrong[1].square()).mean())
    least = 1e-3 * (outputs(DRAWN, True, "") - images).square().mean()
    # a base with random weights has no use of prompts, so the unit is a thousandth of its loss
    close("forgotten", (told[0] - told[1]) / max(told[0], least), off=1e-5)
    assert found["overfit"] == pytest.approx(found["learned"] - found["held_out"])


def test_what_can_not_be_measured_is_left_out(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    family = load_family(str(tiny_bases["sd1"]))
    LoRA(rank=2).attach(family, 0)
    probe = probe_of(family, tmp_path, classes=False)
    assert probe.left_out == ["class_drift", "empty_class", "takeover"]
    assert set(probe.values()) == set(MEASURES) - {"class_drift", "empty_class", "takeover", "prompts_lost"}


def test_neutral_prompts_name_no_noun_of_the_run() -> None:
    every = neutral_prompts([], 100)
    assert len(every) == len(set(every)) >= 12
    left = neutral_prompts(["Sports Car", None, "fish"], 100)
    assert set(left) < set(every)
    assert not any({"car", "fish"} & set(prompt.split()) for prompt in left)
    assert len(neutral_prompts(["car"])) == len(neutral_prompts(["mug"]))
    assert not any("man's" in prompt for prompt in neutral_prompts(["man"], 100))
    assert not any("mountains" in prompt for prompt in neutral_prompts(["mountain"], 100))
    assert neutral_prompts(["toy in a box on the shelf of a shop"], 100) == every


def test_a_base_is_asked_with_prompts_of_its_own_list() -> None:
    listed = ["a red mug", "a blue fish", *(f"a green car {number}" for number in range(20))]
    assert known_prompts(["mug"], listed) == listed[1:9]
    assert known_prompts(["fish", "car"], ["a blue fish"]) == neutral_prompts(["fish", "car"])  # nothing is left of it


def test_a_share_of_the_way() -> None:
    way = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    length = float(way.square().mean())
    assert share_of_way(way, way, 0.1) == pytest.approx(1)
    assert share_of_way(0.3 * way, way, 0.1) == pytest.approx(0.3)
    assert share_of_way(-way, way, 0.1) == pytest.approx(-1)
    assert share_of_way(way, way, 4 * length) == pytest.approx(0.25)  # the way is too short to be one


def test_what_is_added_to_every_prediction_is_no_drift() -> None:
    """Grain, for example; and a change of what the prompt does is one, in units of what it did."""
    made = torch.Generator().manual_seed(0)
    plain, effect, grain = (torch.randn(2, 4, 4, 4, generator=made) for _ in range(3))
    base = {"a": list(plain + effect), "b": list(plain)}
    assert Look({}, {"a": list(plain + effect + grain), "b": list(plain + grain)}, base).drift("a", "b") < 1e-6
    now = {"a": list(plain + grain + 1.5 * effect), "b": list(plain + grain)}
    assert Look({}, now, base).drift("a", "b") == pytest.approx(0.5)
