"""A recipe, looked at: photos, captions, token and base, before anything is written; and the plan in numbers."""

from __future__ import annotations

from collections import Counter
from typing import Any

from finetune.core.determinism import is_repeatable
from finetune.data.buckets import Size, cut_away
from finetune.data.crops import enlarged
from finetune.data.samplers import group_count
from finetune.jobs.prepare import Prepared
from finetune.objectives.registry import build_objective
from finetune.training.accelerate import resolve_precision
from finetune.training.prior import ClassImages

CROPPED = 0.1  # a square crop that cuts away more of a photo is told


def plan(job: Prepared) -> dict[str, Any]:
    """The run in numbers: what is seen how often, what is trained, what it costs in class images."""
    recipe = job.recipe
    seen = recipe.run.steps * recipe.run.batch_size
    times = seen / len(job.photos)
    if recipe.data.shape == "buckets":
        times = recipe.run.steps / _groups(job)
    several = len(job.subjects) > 1
    rows: dict[str, Any] = {
        "base": f"{recipe.base.source} ({job.family.name}, {job.family.schedule.prediction})",
        **_subject_rows(job),
        "training prompts": list(dict.fromkeys(text for texts in job.captions for text in texts))[:5],
        **({} if several else {"token": f"{job.token} (class noun: {job.noun or 'none'})"}),
        "resolution": job.resolution,
        "steps": f"{recipe.run.steps} of {recipe.run.batch_size} photo(s), {recipe.run.accumulate} micro-batch(es)",
        "each photo": f"seen {times:.0f} times",
        **_shape_rows(job),
    }
    if recipe.data.masks != "none":
        rows["masks"] = (
            f"of {len(job.masks)} of {len(job.photos)} photos; background counts {recipe.data.mask_floor:g}"
        )
    if job.family.inputs is not None:
        rows["inputs"] = f"{job.family.inputs}{' (new to this base)' if job.family.widened else ''}"
    if note := enlarged(job.photos, job.sizes if recipe.data.shape == "buckets" else job.resolution):
        rows["enlarged"] = note
    if isinstance(recipe.prior, ClassImages):
        sets = " and ".join(f"{recipe.prior.count} of {prompt!r}" for prompt in job.class_nouns)
        often = seen / recipe.prior.count / len(job.class_nouns)
        rows["class images"] = f"{sets}, each seen {often:.1f} times"
    method = recipe.method
    if cost := recipe.prior.cost(method, job.family, " or ".join(job.class_nouns)):
        rows["prior"] = cost
    objective = build_objective(recipe.objective, job.family.schedule, job.family.shift(job.resolution))
    rows["timesteps"] = objective.describe()
    rows["method"] = f"{method.kind} on {', '.join(method.part_names(job.family))}"
    rows["precision"] = resolve_precision(recipe.run)
    if not is_repeatable(job.family.device, recipe.run.deterministic):
        rows["resume"] = "with the same batches and noise, but other last bits (run.deterministic=true: bit for bit)"
    return rows


def _subject_rows(job: Prepared) -> dict[str, str]:
    """What each subject is called, and where its captions come from."""
    if len(job.subjects) == 1:
        return {"subject": job.subjects[0].summary}
    return {
        f"subject {number}": f"{_photos_of(len(subject.photos))}, token {subject.token} (class noun: "
        f"{subject.noun or 'none'}); {subject.summary}"
        for number, subject in enumerate(job.subjects, 1)
    }


def _groups(job: Prepared) -> int:
    """Steps in which every photo is seen once, with buckets."""
    return group_count(list(Counter(job.sizes).values()), job.recipe.run.batch_size)


def _shape_rows(job: Prepared) -> dict[str, str]:
    """The bucket table, and what the crops cut away."""
    if job.recipe.data.shape == "square":
        share, name = _most_cut(job, job.sizes)
        if share <= CROPPED:
            return {}
        better, _ = _most_cut(job, job.bucket_sizes())
        helps = better < share and job.resolution % job.family.size_multiple == 0
        hint = f": data.shape=buckets would cut away at most {better:.0%}" if helps else ""
        return {"cropped": f"up to {share:.0%} of a photo ({name}) is cut away by the square crop{hint}"}
    counts = Counter(job.sizes)
    parts = [f"{width}x{height}: {_photos_of(counts[width, height])}" for width, height in sorted(counts)]
    share, name = _most_cut(job, job.sizes)
    parts.append(f"at most {share:.0%} of a photo ({name}) is cut away" if share else "nothing is cut away")
    rows = {"buckets": "; ".join(parts)}
    places = _groups(job) * job.recipe.run.batch_size
    if places > len(job.photos):
        spare = places - len(job.photos)
        rows["padding"] = f"{spare} of {places} places of an epoch are repeats that count nothing"
    return rows


def _photos_of(count: int) -> str:
    return f"{count} photo" if count == 1 else f"{count} photos"


def _most_cut(job: Prepared, sizes: list[Size]) -> tuple[float, str]:
    """The largest share of a photo that its crop cuts away, and that photo's name."""
    cut = [(cut_away(photo.size, size), name) for photo, size, name in zip(job.photos, sizes, job.names, strict=True)]
    return max(cut)
