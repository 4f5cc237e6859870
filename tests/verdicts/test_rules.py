"""The words on made-up curves, the recommended step, and when a run is measured."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from finetune.config.load import load_recipe
from finetune.core.events import Measured
from finetune.training.settings import Run
from finetune.verdicts.advice import Means, means_of
from finetune.verdicts.due import (
    DRAWN,
    FIRST,
    OFTEN,
    POINTS,
    SHARE,
    TRAINED,
    asks_drawings,
    due_steps,
    samples_in_step,
)
from finetune.verdicts.rows import Row, VerdictsFile, read_rows, writable
from finetune.verdicts.rules import (
    DAMAGED,
    DRIFTED,
    GOOD,
    LIMITS,
    NOTHING,
    OVERTRAINED,
    UNDERTRAINED,
    best_row,
    in_short,
    judged,
    score,
)  # fmt: skip

NONE = dict.fromkeys(("class_drift", "takeover", "elsewhere", "forgotten", "empty_class", "empty_prompt"), 0.0)


def row(step: int, learned: float, held_out: float, **drifts: float) -> Row:
    """All in units of the limits."""
    moved = {name: value * getattr(LIMITS, name) for name, value in drifts.items()}
    own = {"learned": learned * LIMITS.learned, "held_out": held_out * LIMITS.learned}
    return Row(step, NONE | own | {"overfit": own["learned"] - own["held_out"]} | moved)


BEGIN = row(0, 0, 0)


@pytest.mark.parametrize(
    ("rows", "word"),
    [
        ([row(50, 0.4, 0.3)], UNDERTRAINED),
        ([row(50, 1.0, 0.9), row(100, 1.6, 1.5)], GOOD),
        ([row(50, 1.6, 1.5), row(100, 12.0, 1.0)], OVERTRAINED),
        ([row(50, 2.0, 2.0), row(100, 2.2, 0.5)], OVERTRAINED),
        ([row(50, 1.6, 1.5, prompts_lost=1.1)], OVERTRAINED),
        ([row(50, 1.6, 1.5, prompts_lost=0.9)], GOOD),
        ([row(50, 1.6, 1.5, class_drift=1.5)], DRIFTED),
        ([row(50, 1.6, 1.5, takeover=1.5)], DRIFTED),
        ([row(50, 1.6, 1.5, elsewhere=1.5)], DAMAGED),
        ([row(50, 1.6, 1.5, forgotten=1.1)], DAMAGED),
        ([row(50, 1.6, 1.5, empty_class=1.1)], DAMAGED),
        ([row(50, 1.6, 1.5, empty_prompt=1.1, class_drift=2.0)], DAMAGED),
    ],
)
def test_words(rows: list[Row], word: str) -> None:
    verdict = judged([BEGIN, *rows])
    assert verdict.word == word == verdict.found[0]
    assert verdict.sentence.endswith(".")
    assert word == GOOD or verdict.advice.endswith(".")


def test_nothing_measured_says_nothing() -> None:
    assert judged([]).word == judged([BEGIN]).word == NOTHING
    assert judged([BEGIN]).found == ()
    assert best_row([BEGIN]) is None


def test_every_word_that_holds_is_found_and_the_gravest_first() -> None:
    verdict = judged([BEGIN, row(50, 12, 1, elsewhere=2, class_drift=2)])
    assert verdict.found == (DAMAGED, DRIFTED, OVERTRAINED)
    assert judged([BEGIN, row(50, 0.2, 0.2, elsewhere=2)]).found == (DAMAGED, UNDERTRAINED)


def test_prompts_that_are_lost_before_the_photos_are_learned_ask_for_a_lower_rate() -> None:
    verdict = judged([BEGIN, row(50, 0.5, 0.4, prompts_lost=2)])
    assert verdict.found == (OVERTRAINED, UNDERTRAINED)
    assert verdict.advice == "Lower optim.lr, and train longer (run.steps)."


def test_the_best_step_is_before_the_damage_and_the_advice_names_it() -> None:
    rows = [BEGIN, row(50, 0.5, 0.5), row(100, 1.5, 1.4)]
    rows += [row(150, 1.9, 1.8, elsewhere=2.5), row(200, 2, 2, elsewhere=4)]
    best = best_row(rows)
    assert best is not None
    assert best.step == 100
    assert "checkpoint of step 100" in judged(rows).advice
    ahead = [best_row(rows[: number + 1]) for number in range(1, len(rows))]
    assert [item.step for item in ahead if item] == [50, 100, 100, 100]  # each is known when its step is done


def test_within_the_limits_more_learning_is_better_and_the_last_of_like_steps_is_taken() -> None:
    """Step 50 has learned far more than a good run needs, and step 300 twice of that: its details are better."""
    rows = [BEGIN, row(50, 3, 3), row(300, 6, 6), row(500, 5.8, 5.8)]
    best = best_row(rows)
    assert best is not None
    assert best.step == 500
    assert judged(rows).advice == ""
    beyond = best_row([*rows, row(550, 9, 9, elsewhere=1.05)])
    assert beyond is not None
    assert beyond.step == 500
    by_heart = best_row([*rows, row(550, 20, 4)])
    assert by_heart is not None
    assert by_heart.step == 500


def test_no_later_row_brings_an_earlier_one_back() -> None:
    """Its checkpoint may be gone by then."""
    numbers = random.Random(0)
    for _ in range(200):
        rows = [BEGIN]
        for step in range(1, 12):
            learned = numbers.uniform(0, 4)
            rows.append(row(step, learned, learned * numbers.random(), elsewhere=numbers.uniform(0, 1.5)))
        best = [item.step for number in range(2, 13) if (item := best_row(rows[:number])) is not None]
        assert best == sorted(best)


def test_score_rises_with_learning_and_falls_with_each_drift() -> None:
    assert score(row(1, 1, 1)) > score(row(1, 1, 0.5))
    for name in NONE:
        assert score(row(1, 1, 1, **{name: 1.0})) == score(row(1, 1, 1))  # up to its limit a drift is free
        assert score(row(1, 1, 1, **{name: 1.3})) < score(row(1, 1, 1))


def test_a_run_without_a_class_is_judged_by_the_rest() -> None:
    values = {"learned": 2 * LIMITS.learned, "held_out": 2 * LIMITS.learned, "overfit": 0.0, "elsewhere": 0.0}
    assert judged([Row(5, values)]).word == GOOD


def test_measuring_costs_at_most_its_share() -> None:
    for steps, samples in ((500, 4), (800, 2), (3000, 1), (100_000, 8)):
        due = due_steps(Run(steps=steps), samples)
        more = DRAWN * asks_drawings(Run(steps=steps), samples)
        assert len(due) * (POINTS + more) + FIRST + more <= SHARE * TRAINED * steps * samples
        assert 3 <= len(due) <= OFTEN
        assert due[-1] == steps
    assert due_steps(Run(steps=4), 4) == []  # too short
    assert [asks_drawings(Run(steps=steps), 2) for steps in (800, 1000)] == [False, True]
    assert asks_drawings(Run(steps=30, keep_best=True), 1)
    assert len(due_steps(Run(steps=30, verdicts="on"), 1)) == OFTEN
    assert len(due_steps(Run(steps=30, keep_best=True), 1)) == OFTEN
    assert due_steps(Run(steps=7, verdicts_every=3), 1) == [3, 6, 7]
    assert due_steps(Run(steps=4000, verdicts="off"), 4) == []


def test_off_in_yaml_and_settings_without_effect() -> None:
    assert Run.model_validate({"verdicts": False}).verdicts == "off"
    assert Run.model_validate({"verdicts": True}).verdicts == "on"
    with pytest.raises(ValueError, match="keep_best"):
        Run(verdicts="off", keep_best=True)
    with pytest.raises(ValueError, match="verdicts_every"):
        Run(verdicts="off", verdicts_every=5)


@pytest.mark.parametrize(
    ("means", "advised"),
    [
        (Means(), "Set prior.kind=class_images to keep the class and prior.others.count=256 to keep everything else."),
        (Means(holds_class=True), "Set prior.others.count=256 to keep everything else."),
        (
            Means(holds_class=True, dropout=0.25),
            "Set prior.others.count=256 with prior.caption_dropout=0 to keep everything else.",
        ),
        (
            Means(holds_class=True, holds_others=True, dropout=0.1),
            "Set prior.caption_dropout=0 to keep everything else.",
        ),
        (Means(holds_class=True, holds_others=True), "The run has a prior of the class and one of everything else"),
        (Means(barred=True), None),
    ],
)
def test_the_advice_is_what_the_run_does_not_do_already(means: Means, advised: str | None) -> None:
    rows = [BEGIN, row(50, 1.5, 1.4), row(100, 1.5, 1.4, elsewhere=2, class_drift=2)]
    said = judged(rows, means=means).advice
    assert said.startswith("Lower optim.lr or run.steps, or use the checkpoint of step 50 (it was not kept")
    assert advised in said if advised else "prior" not in said
    for name in ("prior.kind", "prior.others", "caption_dropout"):
        assert (name in said) == bool(advised and name in advised)
    assert "(it is kept: finetune export RUN --step 50)" in judged(rows, means=replace(means, kept=(50,))).advice


def test_the_advice_is_a_setting_that_the_recipe_takes() -> None:
    """With each prior: what is advised is accepted, and then it is not advised again."""
    bad = [BEGIN, row(100, 1.5, 1.4, elsewhere=2, class_drift=2)]
    for kind in ("none", "class_images", "frozen_base", "distance"):
        own = ["data.photos=photos", "data.class_noun=mug", f"prior.kind={kind}", "prior.others=null"]
        said = judged(bad, means=means_of(load_recipe("dreambooth-lora", own).prior, None, ())).advice
        told = re.findall(r"prior\.[a-z_.]+=[a-z_0-9]+", said)
        assert told
        followed = load_recipe("dreambooth-lora", [*own, *told])
        again = judged(bad, means=means_of(followed.prior, None, ())).advice
        assert not [setting for setting in told if setting in again]


def test_a_best_step_that_is_not_good_is_not_praised() -> None:
    rows = [BEGIN, row(50, 1.5, 1.4, elsewhere=2), row(100, 1.5, 1.4, elsewhere=3)]
    assert "step 50 (it was not kept: train again with run.keep_best=true), the best of" in judged(rows).advice
    assert "not good either" in judged(rows).advice
    assert "not good" not in judged([BEGIN, row(50, 1.5, 1.4), rows[-1]]).advice


def test_undertrained_and_damaged_is_not_told_to_train_less() -> None:
    said = judged([BEGIN, row(100, 0.2, 0.2, elsewhere=2)]).advice
    assert said.startswith("Lower optim.lr.")
    assert "run.steps" not in said


def test_the_sentence_names_what_is_beyond_its_limit_alone() -> None:
    only = judged([BEGIN, row(100, 1.5, 1.4, empty_prompt=1.5)]).sentence
    assert "empty prompt" in only
    assert "other things" not in only
    assert "empty" not in judged([BEGIN, row(100, 1.5, 1.4, elsewhere=1.5)]).sentence


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_a_model_that_predicts_no_numbers_is_not_good(value: float, tmp_path: Path) -> None:
    broken = dict.fromkeys(row(1, 0, 0).values, value)
    rows = [BEGIN, row(50, 1.5, 1.4), Row(100, writable(broken))]
    verdict = judged(rows)
    assert verdict.found == (DAMAGED,)
    assert "no numbers" in verdict.sentence
    assert verdict.step == 50
    VerdictsFile(tmp_path)(Measured(100, broken, 0.1))
    assert judged(read_rows(tmp_path / "verdicts.jsonl")).found == (DAMAGED,)


def test_what_is_in_memory_is_what_is_read_back(tmp_path: Path) -> None:
    """Else a run that goes on after a kill could recommend another step."""
    values = writable({"learned": 1 / 3, "held_out": 2e-7})
    VerdictsFile(tmp_path)(Measured(100, values, 0.1))
    assert dict(read_rows(tmp_path / "verdicts.jsonl")[0].values) == values


def test_samples_in_a_step_are_those_of_all_streams() -> None:
    def samples(*own: str) -> float:
        same = ["data.photos=p", "data.class_noun=mug", "run.batch_size=4", "prior.others=null"]
        recipe = load_recipe("dreambooth-lora", [*same, *own])
        return samples_in_step(recipe.run, recipe.prior)

    assert samples("prior.kind=none") == 4
    assert samples("prior.kind=class_images", "prior.share=1") == 8
    assert samples("prior.kind=none", "prior.others.share=0.25") == 5
    assert samples("prior.kind=class_images", "prior.share=0.5", "prior.others.share=0.25") == 7


def test_a_style_is_called_a_style() -> None:
    rows = [Row(10, {"learned": 4.0, "held_out": 3.0, "takeover": 0.9, "empty_prompt": 0.9})]
    said = judged(rows, means=Means(thing="style")).sentence
    assert "the empty prompt went 90 % of the way to the style" in said.lower()
    assert "what prompts without the style's words draw changed too" in said
    assert "subject" not in said
    good = judged([Row(10, {"learned": 4.0})], means=Means(thing="style")).sentence
    assert good.startswith("The drawings are predicted better than by the base (4.00 on unseen views)")


def test_good_says_what_was_measured_and_not_what_images_show() -> None:
    said = judged([Row(10, {"learned": 0.97, "held_out": 0.98, "elsewhere": 0.1})]).sentence
    assert said.startswith("The photos are predicted better than by the base (0.98 on unseen views)")
    assert "learned" not in said, "half-learned subjects are predicted better too"


def test_nothing_is_not_written_as_minus_nothing() -> None:
    assert in_short({"learned": -0.001, "elsewhere": -0.1}) == "learned 0.00, elsewhere -0.10"
