"""What the measures say in words, and which checkpoint they recommend. Every threshold of the verdicts is here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from finetune.verdicts.advice import Best, Means, Word, advice
from finetune.verdicts.rows import BROKEN, Row

UNDERTRAINED, GOOD, OVERTRAINED, DRIFTED, DAMAGED = (word.value for word in Word)
WORDS = (UNDERTRAINED, GOOD, OVERTRAINED, DRIFTED, DAMAGED)
NOTHING = "not measured"
CLOSE = 0.1  # of two scores


@dataclass(frozen=True)
class Limits:
    """Where a verdict changes, in units of the base's own effect of prompts (`finetune.verdicts.base`).

    They were set on development runs of `benchmarks/verdicts.py` alone: between the values of runs on either side of
    them, by the judge (docs/verdicts.md says how many). In brackets: the nearest values, and what the judge saw there.

    Attributes:
        learned: less was learned, on photos and unseen views: "undertrained" (.74: a gain of .07; .86: .73).
        overfit: a larger share of what was learned holds for the photos alone: "overtrained" (.88: all places are
            drawn, and in four runs with .95 to .98; .91: none of the images of one place, and in others .95 and .98).
        fall: the unseen views lost more than this share of their best value: "overtrained" (.70: all places, and in
            one run with .81; .74: a third of the images of one place).
        prompts_lost: more of what a sample prompt says is missing in its images: "overtrained" (.09: all images show
            it, and in one run three of the four, of all .67; .55: a quarter, of all .5).
        class_drift: what the class's prompt does moved farther: "class drifted". No run was seen that this limit
            tells (1.39: the class is no more the subject than before). At 1.4 the prompt may as well not be there.
        takeover: the class went more of the way to the subject: "class drifted" (.35: no image of the class shows it;
            1.01: a quarter).
        elsewhere: what other prompts do moved farther: "base damaged" (.60: .15 fewer of them are right; .69: .40).
        forgotten: other prompts lost more of what they say of the base's own drawings: "base damaged" (.25: none fewer
            of them are right; .36: .20, and .42: .60).
        empty_class: the empty prompt went more of the way to the class: "base damaged" (.34: it draws the class .33
            of the time more often, and in another run .42; .58: .58).
        empty_prompt: the empty prompt went more of the way to the subject: "base damaged" (.41: it draws the class no
            more than before; .99: half of the time more).
    """

    learned: float = 0.8
    overfit: float = 0.9
    fall: float = 0.72
    prompts_lost: float = 0.3
    class_drift: float = 1.4
    takeover: float = 0.6
    elsewhere: float = 0.68
    forgotten: float = 0.3
    empty_class: float = 0.45
    empty_prompt: float = 0.6


LIMITS = Limits()


@dataclass(frozen=True)
class Limit:
    """The limit of one measure: what it should be at `least`, or else at most."""

    value: float
    least: bool

    def broken_by(self, name: str, values: Mapping[str, float]) -> bool:
        """Whether the measure of that name is beyond it; of what was learned, the larger number counts."""
        if self.least:
            return max(values.get("learned", 0.0), values.get("held_out", -math.inf)) < self.value
        return values.get(name, 0.0) > self.value


def limit_of(measure: str) -> Limit | None:
    """The limit of a measure by its name; None for one that is judged together with others."""
    if measure in ("learned", "held_out"):
        return Limit(LIMITS.learned, least=True)
    most = _drift_limits(LIMITS) | {"prompts_lost": LIMITS.prompts_lost}
    return Limit(most[measure], least=False) if measure in most else None


@dataclass(frozen=True)
class RunVerdict:
    """`word` is one of WORDS, or NOTHING; `found` are all words that hold, the gravest first, as `word` is. `sentence`
    says what was measured and `advice` what to do. `step` is the recommended step; None: there is none."""

    word: str
    found: tuple[str, ...]
    sentence: str
    advice: str
    step: int | None


def judged(rows: Sequence[Row], limits: Limits = LIMITS, means: Means | None = None) -> RunVerdict:
    """The verdict on the last row, in view of those before it. `means` of the run decide what is advised."""
    measured = [row for row in rows if row.step]
    if not measured:
        return RunVerdict(NOTHING, (), "", "", None)
    last, best = measured[-1], best_row(rows, limits) or measured[-1]
    found = _found(measured, limits)
    until = [row for row in measured if row.step <= best.step]
    other = None if best is last else Best(best.step, not _found(until, limits))
    means = means or Means()
    told = advice(found, other, means)
    word = found[0] if found else GOOD
    return RunVerdict(word, found or (GOOD,), _sentence(found, measured, limits, means.thing), told, best.step)


def _found(rows: Sequence[Row], limits: Limits) -> tuple[str, ...]:
    """The words that hold of the last row, the gravest first."""
    return tuple(word for word in (DAMAGED, DRIFTED, OVERTRAINED, UNDERTRAINED) if _holds(word, rows, limits))


def best_row(rows: Sequence[Row], limits: Limits = LIMITS) -> Row | None:
    """The row to recommend: the last one whose `score` is within `CLOSE` of the highest. A little more or less of what
    was learned is noise, and late steps have the schedule's smallest rates.

    A later row never makes an earlier one the best again, so that `run.keep_best` may remove its checkpoint. None if
    nothing was measured after step 0.
    """
    scores = [(score(row, limits), row) for row in rows if row.step]
    highest = max((value for value, _ in scores), default=0.0)
    return next((row for value, row in reversed(scores) if value >= highest - CLOSE), None)


def score(row: Row, limits: Limits = LIMITS) -> float:
    """How good a step is to recommend.

    Learning counts in units of `limits.learned`; what is missing to 1 counts twice, because a step at which nothing
    was changed and nothing learned is of no use. Within all limits the step that learned most is the best. Beyond one,
    learning counts up to twice what a good run needs, and each drift costs what it is above its limit, in units of it.
    """
    values = row.values
    if _broken(values):
        return -math.inf
    unseen = values.get("held_out", values.get("learned", 0.0))
    learned = unseen / limits.learned
    costs = sum(max(0.0, values.get(name, 0.0) / limit - 1) for name, limit in _drift_limits(limits).items())
    by_heart = values.get("learned", 0.0) - unseen > limits.overfit * values.get("learned", 0.0)
    more = max(0.0, 1 - 2 / max(learned, 2.0)) if not costs and not by_heart else 0.0  # grows with learning, below 1
    return min(learned, 2.0) + more - max(0.0, 1 - learned) - costs


def _drift_limits(limits: Limits) -> dict[str, float]:
    names = ("class_drift", "takeover", "elsewhere", "forgotten", "empty_class", "empty_prompt")
    return {name: getattr(limits, name) for name in names}


def _broken(values: Mapping[str, float]) -> bool:
    """Whether the model's predictions are no numbers, or far from all that images need."""
    return any(abs(value) >= BROKEN for value in values.values())


def _holds(word: str, rows: Sequence[Row], limits: Limits) -> bool:
    values = rows[-1].values
    if _broken(values):
        return word == DAMAGED
    beyond = {name for name, limit in _drift_limits(limits).items() if values.get(name, 0.0) > limit}
    if word == DAMAGED:
        return bool(beyond - {"class_drift", "takeover"})
    if word == DRIFTED:
        return bool(beyond & {"class_drift", "takeover"})
    learned, unseen = values.get("learned", 0.0), values.get("held_out", values.get("learned", 0.0))
    if word == UNDERTRAINED:
        return max(learned, unseen) < limits.learned
    return _by_heart(rows, limits) or values.get("prompts_lost", 0.0) > limits.prompts_lost


def _by_heart(rows: Sequence[Row], limits: Limits) -> bool:
    """Whether much more was learned of the photos than of the unseen views, or these became worse again."""
    values = rows[-1].values
    learned, unseen = values.get("learned", 0.0), values.get("held_out", values.get("learned", 0.0))
    top = max(row.values.get("held_out", 0.0) for row in rows)
    enough = learned >= limits.learned
    return enough and (learned - unseen > limits.overfit * learned or unseen < (1 - limits.fall) * top)


def in_short(values: Mapping[str, float]) -> str:
    """The measures on one line of the console."""
    names = {"learned": "learned", "held_out": "unseen views", "class_drift": "class", "takeover": "class as subject"}
    names |= {
        "elsewhere": "elsewhere",
        "forgotten": "forgotten",
        "empty_class": "empty as class",
        "empty_prompt": "empty as subject",
    }
    return ", ".join(f"{text} {values[name]:z.2f}" for name, text in names.items() if name in values)


def _sentence(found: Sequence[str], rows: Sequence[Row], limits: Limits, thing: str) -> str:
    if _broken(rows[-1].values):
        return "The model predicts no numbers any more, or far too large ones: it draws nothing."
    said = [text for word in (found or (GOOD,)) for text in [_said(word, rows, limits, thing)] if text]
    return "; ".join(said).capitalize() + "."


def _said(word: str, rows: Sequence[Row], limits: Limits, thing: str) -> str:
    """What a word stands on, with its numbers."""
    values = rows[-1].values
    learned = values.get("held_out", values.get("learned", 0.0))
    shown = "photos" if thing == "subject" else "drawings"
    plain = "the class without the token" if thing == "subject" else "what prompts without the style's words draw"
    return {
        UNDERTRAINED: f"little of the {thing} was learned ({learned:.2f} of the prompt's own effect)"
        if learned >= 0
        else f"nothing of the {thing} was learned: its photos are predicted worse than by the base",
        OVERTRAINED: _overtrained(rows, limits),
        DRIFTED: f"{plain} changed too (drift {values.get('class_drift', 0.0):.2f}, "
        f"{100 * max(0.0, values.get('takeover', 0.0)):.0f} % of the way to the {thing})",
        DAMAGED: _damage(values, limits, thing),
        GOOD: f"the {shown} are predicted better than by the base ({learned:.2f} on unseen views), and little else "
        f"changed (drift {values.get('elsewhere', 0.0):.2f})",
    }[word]


def _overtrained(rows: Sequence[Row], limits: Limits) -> str:
    values = rows[-1].values
    learned, unseen = values.get("learned", 0.0), values.get("held_out", values.get("learned", 0.0))
    lost = values.get("prompts_lost", 0.0)
    by_heart = f"the photos were learned by heart ({learned:.2f} on them, {unseen:.2f} on unseen views)"
    said = [by_heart] * _by_heart(rows, limits)
    said += [f"the images do not show {100 * min(1.0, lost):.0f} % of what a sample prompt says"] * (
        lost > limits.prompts_lost
    )
    return ", and ".join(said)


def _damage(values: Mapping[str, float], limits: Limits, thing: str) -> str:
    """Of the measures of damage those that are beyond their limits."""
    names = ("elsewhere", "forgotten", "empty_class", "empty_prompt")
    other, lost, of_class, empty = (values.get(name, 0.0) for name in names)
    said = [f"prompts about other things changed (drift {other:.2f})"] * (other > limits.elsewhere)
    said += [f"prompts about other things lost {100 * lost:.0f} % of their use"] * (lost > limits.forgotten)
    said += [f"the empty prompt went {100 * of_class:.0f} % of the way to the class"] * (of_class > limits.empty_class)
    said += [f"the empty prompt went {100 * empty:.0f} % of the way to the {thing}"] * (empty > limits.empty_prompt)
    return ", and ".join(said)
