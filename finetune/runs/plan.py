"""The plan of a run as a record, and its rows of text for the user."""

from __future__ import annotations

import math
from typing import Any

from pydantic import BaseModel, ConfigDict

from finetune.core.files import public_name
from finetune.data.captions import with_trigger
from finetune.families.toy import expectation

PlanRows = dict[str, Any]  # label -> a text, a number or a list of texts


class Record(BaseModel):
    """A part of run.json: typed and read-only. Unknown keys are ignored."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())


class PlannedSubject(Record):
    """One subject of the plan. `captions` is a sentence about where its captions come from.

    `style`: the words that call a style, such as "in zwx style"; empty for other subjects. `words`: those that call
    it in its captions, such as "zwx mug"; empty in an older record. `warning`: what the base may know by a token that
    the user chose; empty if nothing.
    """

    token: str
    noun: str | None
    photos: int
    captions: str
    style: str = ""
    words: str = ""
    warning: str = ""

    @property
    def called(self) -> str:
        """What to write in a prompt."""
        if self.style:
            return (
                f"{self.token} (a style: write {self.style!r} in prompts, as {with_trigger('a house', self.style)!r})"
            )
        alone = f"; write {self.words!r} alone in prompts" if self.noun and self.words == self.token else ""
        return f"{self.token} (class noun: {self.noun or 'none'}{alone})"


class Cut(Record):
    """The photo that loses most to cropping.

    `share` of its area is cut away, in [0, 1). `in_buckets` is the largest such share with buckets, or None if buckets
    would not help.
    """

    share: float
    photo: str
    in_buckets: float | None = None


class PlannedBucket(Record):
    """One bucket: its size in pixels and its number of photos."""

    width: int
    height: int
    photos: int


class PlannedClassImages(Record):
    """`count` images for each prompt in `prompts`; training sees each image `times` times.

    With `captions`, there are `count` images for that many captions, which are without the words in `prompts`.
    `taught`: the frozen base's predictions are the targets. `share`: samples in a step for each photo.
    """

    prompts: list[str]
    count: int
    times: float
    captions: int = 0
    taught: bool = False
    share: float = 1.0

    @property
    def sets(self) -> str:
        """The images in words, without any caption."""
        if self.captions:
            without = " or ".join(repr(words) for words in self.prompts)
            few = f"the first {self.count} of " if self.count < self.captions else ""
            return f"{self.count} for {few}{self.captions} different captions without {without}"
        return " and ".join(f"{self.count} of {prompt!r}" for prompt in self.prompts)


class PlannedOthers(Record):
    """`count` images of everything else: `empty` for the empty prompt, the rest for `prompts` different ones.

    `left_out` more name the token. `origin` says whose prompts they are. Training sees each image `times` times.
    `share`: samples in a step for each photo. `taught`: the frozen base's predictions are the targets. `slower`: how
    much longer a step takes with them, as a share of its time.
    """

    count: int
    left_out: int = 0
    prompts: int
    origin: str
    empty: int
    times: float
    share: float = 1.0
    taught: bool = False
    slower: float

    @property
    def line(self) -> str:
        """The images in words."""
        out = f" ({self.left_out} more name the token and are left out)" if self.left_out else ""
        each = "" if self.share == 1 else f", {self.share:g} for each photo of a step"
        how = ", which the frozen base teaches" if self.taught else ""
        return (
            f"{self.count} images of the base for {self.prompts} prompts {self.origin}, {self.empty} of them for the "
            f"empty prompt{out}: drawn once for all runs with this base; each seen {self.times:.1f} times{each}{how}; "
            f"about {self.slower:.0%} more time per step"
        )


class PlannedVerdicts(Record):
    """When a run is measured against its base (`finetune.verdicts`), on what, and what it costs.

    `steps`: after which, besides the beginning; empty for a run that is not measured, because it is `off`, `sharded`
    or too short. `predictions` without a gradient in all, which are `share` of the run's work; `answers` of them are
    on what the images of sample prompts show; `drawn_once` more where no run with this base was measured before.
    `points`: photos that are asked about, and `others` prompts about other things, and `drawings` by the base itself;
    `classes`: whether there is a class. `hold_out` photos are not trained on; `held_out` are their names, which are
    private. With `keep_best`, the recommended checkpoint stays beside the newest `keep`.
    """

    steps: list[int] = []
    off: bool = False
    sharded: bool = False
    predictions: int = 0
    answers: int = 0
    drawn_once: int = 0
    share: float = 0.0
    points: int = 0
    others: int = 0
    drawings: int = 0
    classes: bool = True
    hold_out: int = 0
    held_out: list[str] = []
    keep_best: bool = False
    keep: int = 0

    @property
    def line(self) -> str:
        """When, on what and at what cost, in words."""
        if not self.steps:
            short = "the run is too short for its time to pay for them; run.verdicts=on measures it all the same"
            short = "a run with run.shard is not measured" if self.sharded else short
            return f"none: {'run.verdicts is off' if self.off else short}"
        unseen = "what is held out" if self.hold_out else "closer views of them"
        parts = ["the class"] * self.classes + ["the empty prompt", f"{self.others} everyday prompts"]
        whole = f" and on {self.drawings} of the base's own drawings" if self.drawings else ""
        asked = "; whether the images at the end show what the sample prompts say" if self.answers else ""
        once = "the everyday prompts" + " and those" * bool(whole)
        return (
            f"after {_listed_steps(self.steps)}: what it learned, on {self.points} photos and on {unseen}; what else "
            f"it changed, on {', '.join(parts)} (finetune/verdicts/neutral.txt){whole}{asked}; {self.predictions} "
            f"predictions without a gradient, {self.share:.1%} of the run's work, and {self.drawn_once} more for the "
            f"base's own drawings of {once}, which are made once for all runs with it"
        )

    @property
    def best(self) -> str:
        """Which checkpoint stays; "" for none but the newest."""
        if not self.keep_best:
            return ""
        newest = "the newest" if self.keep == 1 else f"the newest {self.keep}"
        return f"the checkpoint that the verdicts recommend is kept beside {newest}: finetune export RUN --step best"


def _listed_steps(steps: list[int]) -> str:
    """All, or the first two and the last with their number."""
    if len(steps) < 5:
        return f"step{'s' * (len(steps) > 1)} {', '.join(map(str, steps))}"
    return f"steps {steps[0]}, {steps[1]}, ..., {steps[-1]} ({len(steps)} times)"


def verdict_rows(planned: PlannedVerdicts, photos: int | None, names: bool) -> PlanRows:
    """The rows about verdicts, held-out photos and the checkpoint that is kept.

    Args:
        photos: how many there are, if that is known.
        names: whether the held-out photos are named.
    """
    rows: PlanRows = {"verdicts": planned.line}
    if planned.hold_out:
        count = _photos_of(planned.hold_out) if photos is None else f"{planned.hold_out} of {_photos_of(photos)}"
        which = f": {', '.join(planned.held_out)}" if names and planned.held_out else ""
        rows["held out"] = f"{count}, not trained on but used to measure what was learned{which}"
    if planned.best:
        rows["best checkpoint"] = planned.best
    return rows


class Plan(Record):
    """What a run trains on, how often it sees it, and what it trains.

    `base`, `prompts`, `drawn`, `emphasis`, `unused` and `drawn_from` are private: they can hold a folder of this
    machine, captions, and the names of files. `drawn`: the captions of photos in their first steps, where steps draw
    them; `emphasis`: photos that are repeated or weighted. `resolution` is in pixels. `buckets` is empty if
    every crop is square. `places` are the samples of an epoch with buckets; `repeats` of them are padding with weight
    0. `enlarged`, `prior` and `timesteps` are texts from the photos, the prior and the objective. `exports`: what the
    trained parts cost when the files are read. `defaults`: the settings that follow the base, and their sources.
    `verdicts`: None in older files.
    """

    base: str
    family: str
    prediction: str
    subjects: list[PlannedSubject]
    prompts: list[str]
    drawn: list[str] = []
    emphasis: list[str] = []
    unused: list[str] = []
    resolution: int
    steps: int
    batch_size: int
    accumulate: int
    times_seen: float
    cut: Cut | None = None
    buckets: list[PlannedBucket] = []
    places: int = 0
    repeats: int = 0
    masked: int | None = None
    mask_floor: float = 0.0
    inputs: str | None = None
    widened: bool = False
    drawn_from: list[str] = []
    enlarged: str | None = None
    class_images: PlannedClassImages | None = None
    others: PlannedOthers | None = None
    prior: str = ""
    timesteps: str
    method: str
    parts: list[str]
    exports: str = ""
    precision: str
    repeatable: bool
    defaults: str = ""
    verdicts: PlannedVerdicts | None = None

    @property
    def photos(self) -> int:
        """The number of photos of all subjects."""
        return sum(subject.photos for subject in self.subjects)


def plan_rows(plan: Plan) -> PlanRows:
    """Returns the plan as rows (label -> text) for the user who runs it."""
    others = {
        "captions drawn": plan.drawn, "emphasis": plan.emphasis,
        "not used": plan.unused, "images drawn from": plan.drawn_from,
    }  # fmt: skip
    named: PlanRows = {label: names for label, names in others.items() if names}
    return _rows(plan, plan.base, {"training prompts": plan.prompts, **named}, private=True)


def plan_lines(plan: Plan) -> list[str]:
    """Returns the plan as lines for the log, in two columns."""
    rows = plan_rows(plan).items()
    return [f"{label:>16}  {'; '.join(row) if isinstance(row, list) else row}" for label, row in rows]


def shared_rows(plan: Plan) -> PlanRows:
    """Returns the plan as rows that are safe to share: without captions, other files' names and the base's path."""
    return _rows(plan, public_name(plan.base), {})


def _rows(plan: Plan, base: str, prompts: PlanRows, private: bool = False) -> PlanRows:
    found: PlanRows = {"base": f"{base} ({plan.family}, {plan.prediction})"}
    expected = expectation(plan.base, [subject.noun for subject in plan.subjects])
    found |= {"expect": expected} if expected else {}
    found |= {**_subject_rows(plan), **prompts}
    if len(plan.subjects) == 1:
        found["token"] = plan.subjects[0].called
    warnings = [subject.warning for subject in plan.subjects if subject.warning]
    if warnings:
        found["known token"] = "; ".join(warnings)
    found["resolution"] = plan.resolution
    found["steps"] = _steps(plan)
    found["each photo"] = _times(plan)
    found |= _bucket_rows(plan) if plan.buckets else _square_rows(plan)
    found |= _data_rows(plan) | _training_rows(plan)
    return found | (verdict_rows(plan.verdicts, plan.photos, private) if plan.verdicts else {})


def _steps(plan: Plan) -> str:
    parts = f", computed in {plan.accumulate} parts" if plan.accumulate > 1 else ""
    return f"{plan.steps}, each on {_photos_of(plan.batch_size)}{parts}"


def _times(plan: Plan) -> str:
    if plan.times_seen >= 1:
        return f"seen {plan.times_seen:.0f} times"
    share = f"{plan.steps} steps of {plan.batch_size} are {plan.times_seen:.0%} of an epoch"
    return f"NOT all are seen: {share}; set run.steps to at least {math.ceil(plan.steps / plan.times_seen)}"


def _subject_rows(plan: Plan) -> PlanRows:
    """One row for each subject: its token, and where its captions come from."""
    if len(plan.subjects) == 1:
        return {"subject": plan.subjects[0].captions}
    return {
        f"subject {number}": f"{_photos_of(subject.photos)}, token {subject.called}; {subject.captions}"
        for number, subject in enumerate(plan.subjects, 1)
    }


def _square_rows(plan: Plan) -> PlanRows:
    if plan.cut is None:
        return {}
    cut = plan.cut
    hint = "" if cut.in_buckets is None else f": data.shape=buckets would cut away at most {cut.in_buckets:.0%}"
    return {"cropped": f"up to {cut.share:.0%} of a photo ({cut.photo}) is cut away by the square crop{hint}"}


def _bucket_rows(plan: Plan) -> PlanRows:
    parts = [f"{bucket.width}x{bucket.height}: {_photos_of(bucket.photos)}" for bucket in plan.buckets]
    cut = plan.cut
    parts.append(f"at most {cut.share:.0%} of a photo ({cut.photo}) is cut away" if cut else "nothing is cut away")
    found = {"buckets": "; ".join(parts)}
    if plan.repeats:
        found["padding"] = f"{plan.repeats} of {plan.places} samples of an epoch are repeats with weight 0"
    return found


def _data_rows(plan: Plan) -> PlanRows:
    found: PlanRows = {}
    if plan.masked is not None:
        found["masks"] = (
            f"{plan.masked} of {plan.photos} photos have one; the background has weight {plan.mask_floor:g}"
        )
    if plan.inputs is not None:
        found["inputs"] = f"{plan.inputs}{' (new to this base)' if plan.widened else ''}"
    if plan.enlarged:
        found["enlarged"] = plan.enlarged
    if plan.class_images is not None:
        images = plan.class_images
        each = "" if images.share == 1 else f", {images.share:g} for each photo of a step"
        taught = ", which the frozen base teaches" if images.taught else ""
        found["class images"] = f"{images.sets}, each seen {images.times:.1f} times{each}{taught}"
    if plan.others is not None:
        found["everything else"] = plan.others.line
    return found


def _training_rows(plan: Plan) -> PlanRows:
    found: PlanRows = {"prior": plan.prior} if plan.prior else {}
    found["timesteps"] = plan.timesteps
    found["method"] = f"{plan.method} on {', '.join(plan.parts)}"
    if plan.exports:
        found["exports"] = plan.exports
    found["precision"] = plan.precision
    if plan.defaults:
        found["defaults"] = plan.defaults
    if not plan.repeatable:
        found["resume"] = "same batches and noise, but rounding may differ (set run.deterministic=true for equal bits)"
    return found


def _photos_of(count: int) -> str:
    return f"{count} photo" if count == 1 else f"{count} photos"
