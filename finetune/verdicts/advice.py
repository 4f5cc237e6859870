"""What to do about a verdict, in the light of what the run does already: an advice that it follows already is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from finetune.data.conditioning.base import INPUTS
from finetune.training.priors.base import PriorSettings


class Word(StrEnum):
    """What a verdict can say."""

    UNDERTRAINED = "undertrained"
    GOOD = "good"
    OVERTRAINED = "overtrained"
    DRIFTED = "class drifted"
    DAMAGED = "base damaged"


@dataclass(frozen=True)
class Means:
    """What a run has against drift, and what it may have.

    `holds_class` and `holds_others`: it has a prior of the class, and one of everything else. `dropout`: the share of
    class captions that are replaced by empty ones. `barred`: its base reads inputs that drawn images do not have.
    `kept`: the steps whose checkpoints are there. `thing`: what is learned, a "subject" or a "style".
    """

    holds_class: bool = False
    holds_others: bool = False
    dropout: float = 0.0
    barred: bool = False
    kept: Sequence[int] = ()
    thing: str = "subject"


def means_of(prior: PriorSettings, inputs: str | None, kept: Sequence[int], thing: str = "subject") -> Means:
    """The means of a run by its prior, by the further inputs of its base, and by its checkpoints."""
    barred = inputs is not None and not INPUTS[inputs].any_image
    dropout = float(getattr(prior, "caption_dropout", 0.0))
    return Means(prior.kind != "none", prior.others is not None, dropout, barred, tuple(kept), thing)


@dataclass(frozen=True)
class Best:
    """The recommended step, which is not the last that was measured. `good`: it is within all limits."""

    step: int
    good: bool


def advice(found: Sequence[str], best: Best | None, means: Means) -> str:
    """Sentences on what to do. `found`: the words that hold, none for a good run. `best`: None for the last step."""
    if not found:
        return "" if best is None else f"Step {best.step} was a little better{_how(best.step, means)}."
    but = "" if best is None or best.good else ", the best of those measured, though not good either"
    earlier = f", or use the checkpoint of step {best.step}{_how(best.step, means)}{but}" if best else ""
    if tuple(found) == (Word.UNDERTRAINED,):
        return "Train longer (run.steps), or raise optim.lr."
    if tuple(found) == (Word.OVERTRAINED, Word.UNDERTRAINED):  # prompts are lost before the photos are learned
        return f"Lower optim.lr, and train longer (run.steps){earlier}."
    if Word.DAMAGED not in found and Word.DRIFTED not in found:
        return f"Train less (run.steps) or on more photos{earlier}."
    first = "Lower optim.lr" if Word.UNDERTRAINED in found else "Lower optim.lr or run.steps"
    return " ".join([f"{first}{earlier}.", *_against_drift(found, means)])


def _how(step: int, means: Means) -> str:
    """How the checkpoint of a step is used."""
    if step in means.kept:
        return f" (it is kept: finetune export RUN --step {step})"
    return " (it was not kept: train again with run.keep_best=true)"


def _against_drift(found: Sequence[str], means: Means) -> list[str]:
    """What holds the class and everything else, as far as the run can have it and does not."""
    if means.barred:
        return []
    missing: list[tuple[str, str]] = []
    there: list[tuple[str, str]] = []
    if Word.DRIFTED in found:
        (there if means.holds_class else missing).append(("prior.kind=class_images", "the class"))
    if Word.DAMAGED in found:
        own = ["prior.others.count=256"] * (not means.holds_others) + ["prior.caption_dropout=0"] * bool(means.dropout)
        setting = " with ".join(own) or "prior.others"
        (missing if own else there).append((setting, "everything else"))
    said = [f"Set {' and '.join(f'{setting} to keep {what}' for setting, what in missing)}."] * bool(missing)
    held = [f"The run has a prior of {' and one of '.join(what for _, what in there)} already."] * bool(there)
    return [*said, *held]
