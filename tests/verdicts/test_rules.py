"""The words on made-up curves, the recommended step, and when a run is measured."""

from __future__ import annotations

import pytest

from finetune.training.settings import Run
from finetune.verdicts.due import FIRST, OFTEN, POINTS, SHARE, TRAINED, due_steps
from finetune.verdicts.rows import Row
from finetune.verdicts.rules import (
    DAMAGED,
    DRIFTED,
    GOOD,
    LIMITS,
    NOTHING,
    OVERTRAINED,
    UNDERTRAINED,
    best_row,
    judged,
    score,
)  # fmt: skip

NONE = dict.fromkeys(("class_drift", "takeover", "elsewhere", "empty_prompt"), 0.0)


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
        ([row(50, 1.6, 1.5), row(100, 4.0, 1.0)], OVERTRAINED),
        ([row(50, 2.0, 2.0), row(100, 2.2, 1.2)], OVERTRAINED),
        ([row(50, 1.6, 1.5, class_drift=1.5)], DRIFTED),
        ([row(50, 1.6, 1.5, takeover=1.5)], DRIFTED),
        ([row(50, 1.6, 1.5, elsewhere=1.5)], DAMAGED),
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
    verdict = judged([BEGIN, row(50, 4, 1, elsewhere=2, class_drift=2)])
    assert verdict.found == (DAMAGED, DRIFTED, OVERTRAINED)
    assert judged([BEGIN, row(50, 0.2, 0.2, elsewhere=2)]).found == (DAMAGED, UNDERTRAINED)


def test_the_best_step_is_before_the_damage_and_the_advice_names_it() -> None:
    rows = [BEGIN, row(50, 0.5, 0.5), row(100, 1.5, 1.4)]
    rows += [row(150, 1.9, 1.8, elsewhere=2.5), row(200, 2, 2, elsewhere=4)]
    best = best_row(rows)
    assert best is not None
    assert best.step == 100
    assert "checkpoint of step 100" in judged(rows).advice
    ahead = [best_row(rows[: number + 1]) for number in range(1, len(rows))]
    assert [item.step for item in ahead if item] == [50, 100, 100, 100]  # each is known when its step is done


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
        assert len(due) * POINTS + FIRST <= SHARE * TRAINED * steps * samples
        assert 3 <= len(due) <= OFTEN
        assert due[-1] == steps
    assert due_steps(Run(steps=4), 4) == []  # too short
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
