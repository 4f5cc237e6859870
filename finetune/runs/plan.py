"""The plan of a run in values, and the one place that makes lines of it for a person."""

from __future__ import annotations

import math
from typing import Any

from pydantic import BaseModel, ConfigDict

from finetune.core.files import public_name

PlanRows = dict[str, Any]  # label -> a text, a number or a list of texts


class Record(BaseModel):
    """A part of run.json: typed, frozen; what a version does not know it leaves out."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())


class PlannedSubject(Record):
    """`captions`: where its captions come from, for a person."""

    token: str
    noun: str | None
    photos: int
    captions: str


class Cut(Record):
    """The photo of which the crops cut away most: `share` of it; `in_buckets`: the most that buckets would cut away
    of a photo, where that is less."""

    share: float
    photo: str
    in_buckets: float | None = None


class PlannedBucket(Record):
    width: int
    height: int
    photos: int


class PlannedClassImages(Record):
    """`count` of each prompt in `prompts`, each seen `times`."""

    prompts: list[str]
    count: int
    times: float


class Plan(Record):
    """What is seen how often, what is trained, and what that costs.

    `base`, `prompts`: private, a folder of this machine and captions. `buckets`: none where every crop is square.
    `repeats`: of the `places` of an epoch, those that count nothing. `enlarged`, `prior`, `timesteps`: what the
    photos, the prior and the objective say of themselves.
    """

    base: str
    family: str
    prediction: str
    subjects: list[PlannedSubject]
    prompts: list[str]
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
    enlarged: str | None = None
    class_images: PlannedClassImages | None = None
    prior: str = ""
    timesteps: str
    method: str
    parts: list[str]
    precision: str
    repeatable: bool

    @property
    def photos(self) -> int:
        return sum(subject.photos for subject in self.subjects)


def plan_rows(plan: Plan) -> PlanRows:
    """For the person whose run it is."""
    return _rows(plan, plan.base, {"training prompts": plan.prompts})


def shared_rows(plan: Plan) -> PlanRows:
    """For a page that may be passed on: without the captions, and a base's folder by its last name."""
    return _rows(plan, public_name(plan.base), {})


def _rows(plan: Plan, base: str, prompts: PlanRows) -> PlanRows:
    found: PlanRows = {"base": f"{base} ({plan.family}, {plan.prediction})", **_subject_rows(plan), **prompts}
    if len(plan.subjects) == 1:
        subject = plan.subjects[0]
        found["token"] = f"{subject.token} (class noun: {subject.noun or 'none'})"
    found["resolution"] = plan.resolution
    found["steps"] = f"{plan.steps} of {plan.batch_size} photo(s), {plan.accumulate} micro-batch(es)"
    found["each photo"] = _times(plan)
    found |= _bucket_rows(plan) if plan.buckets else _square_rows(plan)
    return found | _data_rows(plan) | _training_rows(plan)


def _times(plan: Plan) -> str:
    if plan.times_seen >= 1:
        return f"seen {plan.times_seen:.0f} times"
    share = f"{plan.steps} steps of {plan.batch_size} are {plan.times_seen:.0%} of an epoch"
    return f"NOT all are seen: {share}; set run.steps to at least {math.ceil(plan.steps / plan.times_seen)}"


def _subject_rows(plan: Plan) -> PlanRows:
    """What each subject is called, and where its captions come from."""
    if len(plan.subjects) == 1:
        return {"subject": plan.subjects[0].captions}
    return {
        f"subject {number}": f"{_photos_of(subject.photos)}, token {subject.token} (class noun: "
        f"{subject.noun or 'none'}); {subject.captions}"
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
        found["padding"] = f"{plan.repeats} of {plan.places} places of an epoch are repeats that count nothing"
    return found


def _data_rows(plan: Plan) -> PlanRows:
    found: PlanRows = {}
    if plan.masked is not None:
        found["masks"] = f"of {plan.masked} of {plan.photos} photos; background counts {plan.mask_floor:g}"
    if plan.inputs is not None:
        found["inputs"] = f"{plan.inputs}{' (new to this base)' if plan.widened else ''}"
    if plan.enlarged:
        found["enlarged"] = plan.enlarged
    if plan.class_images is not None:
        images = plan.class_images
        sets = " and ".join(f"{images.count} of {prompt!r}" for prompt in images.prompts)
        found["class images"] = f"{sets}, each seen {images.times:.1f} times"
    return found


def _training_rows(plan: Plan) -> PlanRows:
    found: PlanRows = {"prior": plan.prior} if plan.prior else {}
    found["timesteps"] = plan.timesteps
    found["method"] = f"{plan.method} on {', '.join(plan.parts)}"
    found["precision"] = plan.precision
    if not plan.repeatable:
        found["resume"] = "with the same batches and noise, but other last bits (run.deterministic=true: bit for bit)"
    return found


def _photos_of(count: int) -> str:
    return f"{count} photo" if count == 1 else f"{count} photos"
