"""Makes the plan of a run: what it trains on, how often it sees it, and what it trains."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from finetune.core.determinism import is_repeatable
from finetune.data.buckets import Size, cut_away
from finetune.data.captions import caption_sources
from finetune.data.crops import enlarged
from finetune.data.leftovers import leftovers, listed
from finetune.data.mixes import mix_files
from finetune.data.photos import image_files
from finetune.data.samplers import group_count
from finetune.data.tokens import describe
from finetune.jobs.ask_images import asked_of
from finetune.jobs.dataset import held_out_photos, trained_photos
from finetune.jobs.drawn import drawn_captions, emphasis_lines
from finetune.jobs.neutral import other_prompts
from finetune.jobs.planned_verdicts import planned_verdicts
from finetune.jobs.prepare import Prepared, other_set, used_others
from finetune.jobs.subjects import Subject
from finetune.objectives.registry import build_objective
from finetune.runs.plan import Cut, Plan, PlannedBucket, PlannedClassImages, PlannedOthers, PlannedSubject
from finetune.training.accelerate import resolve_precision
from finetune.training.priors.base import CAPTION

CROPPED = 0.1  # the plan mentions a square crop that cuts away a larger share of a photo


def plan(job: Prepared) -> Plan:
    """Returns the plan of a prepared run.

    Raises:
        BadInput: the objective does not fit the base.
    """
    recipe, family = job.recipe, job.family
    method = recipe.method
    objective = build_objective(recipe.objective, family.schedule, family.shift(job.resolution))
    buckets = recipe.data.shape == "buckets"
    return Plan(
        base=recipe.base.source,
        family=family.name,
        prediction=family.schedule.prediction,
        subjects=_subjects(job),
        prompts=list(dict.fromkeys(text for texts in job.captions for text in texts))[:5],
        drawn=drawn_captions(job),
        emphasis=emphasis_lines(job),
        unused=_unused(job),
        resolution=job.resolution,
        steps=recipe.run.steps,
        batch_size=recipe.run.batch_size,
        accumulate=recipe.run.accumulate,
        times_seen=recipe.run.steps / _groups(job) if buckets else _seen(job) / len(_trained_sizes(job)),
        **(_buckets(job) if buckets else {"cut": _square_cut(job)}),
        masked=None if recipe.data.masks == "none" else len(job.masks),
        mask_floor=recipe.data.mask_floor,
        inputs=family.inputs,
        widened=family.widened,
        drawn_from=_drawn_from(job),
        enlarged=enlarged(job.photos, job.sizes if buckets else job.resolution),
        class_images=_class_images(job),
        others=_others(job),
        prior=recipe.prior.cost(method, family, CAPTION if recipe.prior.of_captions else " or ".join(job.class_nouns)),
        timesteps=objective.describe(),
        method=method.kind,
        parts=list(method.part_names(family)),
        exports=_exports(job),
        precision=resolve_precision(recipe.run),
        repeatable=is_repeatable(family.device, recipe.run.deterministic),
        defaults=recipe.defaults,
        verdicts=planned_verdicts(
            recipe, [job.names[number] for number in sorted(held_out_photos(job))], len(asked_of(job))
        ),
    )


def _trained_sizes(job: Prepared) -> list[Size]:
    """The sizes of an epoch's samples: of all photos but those that are held out, as often as each is repeated."""
    return [job.sizes[number] for number in trained_photos(job) for _ in range(job.emphasis[number][0])]


def _subjects(job: Prepared) -> list[PlannedSubject]:
    """Each subject, with a warning if the user chose a token that the base may know."""
    own_word = "embedding" in job.recipe.method.artifacts
    named = zip(job.subjects, job.recipe.data.all_subjects, strict=True)
    return [
        PlannedSubject(
            token=found.token,
            noun=found.noun,
            photos=len(found.photos),
            captions=found.summary,
            style=found.trigger,
            words=found.words,
            warning="" if own_word or settings.token == "auto" else _known(job, found.token),
        )
        for found, settings in named
    ]


def _known(job: Prepared, token: str) -> str:
    return describe(job.family.word_tokenizers, token).warning


def _drawn_from(job: Prepared) -> list[str]:
    """The files that the recipe names to draw from, and how they are cropped."""
    named = [f"{name}: {path.name}" for name, path in job.recipe.sample.files.items()]
    return named + (job.drawn_from.notes if job.drawn_from else [])


def _exports(job: Prepared) -> str:
    """What a LoRA file loses by its text encoders."""
    recipe, family = job.recipe, job.family
    lost = family.naming.known_readers.cost_of_texts
    if "adapter" not in recipe.method.artifacts or not recipe.method.adapter.trains_texts(family) or not lost:
        return ""
    return f"because of the text encoder, {'; '.join(lost)}; method.parts=[denoiser] avoids it"


def _unused(job: Prepared) -> list[str]:
    """What lies in each subject's folder and is not trained on."""
    named = zip(job.subjects, job.recipe.data.all_subjects, strict=True)
    found = [(subject, _leftovers(job, subject, settings.photos)) for subject, settings in named]
    several = len(found) > 1
    return [f"{listed(names)}{f' of {subject.token}' if several else ''}" for subject, names in found if names]


def _leftovers(job: Prepared, subject: Subject, named: Path) -> list[str]:
    """`named`: what the recipe names, in which the photos' folder may be; or a packed file."""
    if subject.table is not None:
        return []
    folder = subject.photos[0].path.parent
    used = set(image_files(folder))
    used |= {file for photo in subject.photos for file in job.files_beside(photo).values()}
    if job.recipe.data.captions != "templates":
        used |= caption_sources(folder, subject.photos)
        used |= mix_files(folder, subject.photos, job.recipe.data.caption_mix)
    return leftovers(named if named.is_dir() else folder, used)


def _seen(job: Prepared) -> int:
    return job.recipe.run.steps * job.recipe.run.batch_size


def _class_images(job: Prepared) -> PlannedClassImages | None:
    images = job.recipe.prior.class_images
    if images is None:
        return None
    taught, seen = images.target == "base", _seen(job) * images.share
    if job.class_captions:
        triggers = list(dict.fromkeys(subject.trigger for subject in job.subjects))
        several, times = len(job.class_captions), seen / images.count
        return PlannedClassImages(
            prompts=triggers, count=images.count, times=times, captions=several, taught=taught, share=images.share
        )
    times = seen / images.count / len(job.class_nouns)
    return PlannedClassImages(
        prompts=list(job.class_nouns), count=images.count, times=times, taught=taught, share=images.share
    )


def _others(job: Prepared) -> PlannedOthers | None:
    settings, wanted = job.recipe.prior.others, other_set(job)
    if settings is None or wanted is None:
        return None
    used = used_others(job, wanted)
    prompts = [wanted.prompt_of(number) for number in used]
    origin = other_prompts(settings, job.family.folder).origin
    return PlannedOthers(
        count=len(used),
        left_out=settings.count - len(used),
        prompts=len(set(prompts) - {""}),
        origin=origin,
        empty=prompts.count(""),
        times=_seen(job) * settings.share / len(used),
        share=settings.share,
        taught=settings.target == "base",
        slower=settings.passes / job.recipe.prior.passes,
    )


def _groups(job: Prepared) -> int:
    """The number of steps in an epoch with buckets."""
    return group_count(list(Counter(_trained_sizes(job)).values()), job.recipe.run.batch_size)


def _square_cut(job: Prepared) -> Cut | None:
    """What the square crops cut away, and whether buckets would help; None if they cut away little."""
    share, name = _most_cut(job, job.sizes)
    if share <= CROPPED:
        return None
    better, _ = _most_cut(job, job.bucket_sizes())
    helps = better < share and job.resolution % job.family.size_multiple == 0
    return Cut(share=share, photo=name, in_buckets=better if helps else None)


def _buckets(job: Prepared) -> dict[str, Any]:
    """The fields of `Plan` for buckets: the table, the photo that loses most, and the padding."""
    trained = _trained_sizes(job)
    counts = Counter(trained)
    share, name = _most_cut(job, job.sizes)
    places = _groups(job) * job.recipe.run.batch_size
    return {
        "buckets": [PlannedBucket(width=w, height=h, photos=counts[w, h]) for w, h in sorted(counts)],
        "cut": Cut(share=share, photo=name) if share else None,
        "places": places,
        "repeats": max(0, places - len(trained)),
    }


def _most_cut(job: Prepared, sizes: list[Size]) -> tuple[float, str]:
    """The largest share of a photo that its crop cuts away, and the photo's name."""
    pairs = [(photo.size, size) for photo, size in zip(job.photos, sizes, strict=True)]
    shares = {pair: cut_away(*pair) for pair in set(pairs)}
    return max((shares[pair], name) for pair, name in zip(pairs, job.names, strict=True))
