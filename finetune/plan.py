"""A recipe, looked at: photos, captions, token and base, before anything is written; and the plan in numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from finetune import objectives, tokens
from finetune.config import ClassImages, Recipe
from finetune.data.buckets import Size, bucket_table, cut_away, nearest_bucket
from finetune.data.captions import Captioned, caption_photos, summarise
from finetune.data.inputs import Choices, Inputs, make_inputs, registry
from finetune.data.masks import Mask, find_masks
from finetune.data.orders import group_count
from finetune.data.photos import Photo, sort_out
from finetune.data.views import enlarged
from finetune.errors import BadInput
from finetune.export import CHECKPOINT, check_formats
from finetune.families import base_hash as base_hash_of
from finetune.families.base import Family
from finetune.loop import resolve_precision
from finetune.prior import check_set

CROPPED = 0.1  # a square crop that cuts away more of a photo is told
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Job:
    """A recipe, its base and its photos, looked at but not yet worked on."""

    recipe: Recipe
    family: Family
    base_hash: str
    token: str
    photos: list[Photo]
    captions: list[list[str]]
    captions_from_files: int
    caption_summary: str
    resolution: int
    masks: dict[Path, Mask] = field(default_factory=dict)  # of those photos that have one
    inputs: Inputs | None = None  # what the base reads beside its latents

    @property
    def noun(self) -> str | None:
        return self.recipe.data.class_noun

    def fill(self, prompt: str) -> str:
        """A prompt with {token} and {noun} filled in."""
        return prompt.replace("{token}", self.token).replace("{noun}", self.noun or "")

    @property
    def class_prompt(self) -> str:
        return self.fill(next(iter(self.recipe.prior.prompts), ""))

    def sample_prompts(self) -> list[str]:
        return [self.fill(prompt) for prompt in self.recipe.sample.prompts]

    @cached_property
    def sizes(self) -> list[Size]:
        """The (width, height) that each photo is trained at."""
        if self.recipe.data.shape == "square":
            return [(self.resolution, self.resolution)] * len(self.photos)
        return self.bucket_sizes()

    def bucket_sizes(self) -> list[Size]:
        """Each photo's bucket."""
        table = bucket_table(self.resolution, self.family.size_multiple, self.recipe.data.bucket_tolerance)
        return [nearest_bucket(photo.size, table) for photo in self.photos]


def look(recipe: Recipe, device: torch.device | str = "cpu") -> Job:
    """Scans the photos, loads the base on `device`, settles the token and the captions; writes nothing.

    Raises:
        BadInput: whatever is wrong with the photos, the captions, the base or the token.
    """
    photos, left_out = _photos(recipe)
    masks = find_masks(recipe.data.photos, photos, recipe.data.masks)
    check_formats(recipe.export.formats, recipe.method.leaves)
    precision = DTYPES[resolve_precision(recipe.run)]
    family = recipe.base.load(recipe.method.weight_dtype(precision))
    resolution = recipe.data.resolution or family.resolution
    _check_resolution(recipe, resolution, family)
    if recipe.data.encoder_dropout and len(family.text_encoders) == 1:
        raise BadInput(
            f"data.encoder_dropout is {recipe.data.encoder_dropout} but {family.name} has one text encoder: use "
            "data.caption_dropout"
        )
    _refuse_inputs(recipe, family)
    family.check_sampler(recipe.sample.sampler)
    if isinstance(recipe.prior, ClassImages):
        family.check_sampler(recipe.prior.sampler)
    choices = Choices(recipe.run.seed, recipe.data.mask_count, recipe.data.edit_dropout, recipe.sample.image_guidance)
    inputs = make_inputs(family, photos, choices)
    family.to(device)
    objectives.build(recipe.objective, family.schedule, family.shift(resolution))
    token = recipe.method.name_subject(family, recipe.data.token, recipe.data.class_noun) or _token(recipe, family)
    captioned = caption_photos(
        photos,
        captions=recipe.data.captions,
        templates=recipe.data.templates,
        token=token,
        noun=recipe.data.class_noun,
    )
    _refuse_long(recipe, family, captioned)
    summary = "; ".join(text for text in (summarise(captioned, token), left_out) if text)
    base_hash = base_hash_of(family.folder)
    if isinstance(recipe.prior, ClassImages):
        check_set(recipe.prior, recipe.data.class_noun or "", resolution, base_hash)
    texts, from_files = [c.captions for c in captioned], sum(c.source == "file" for c in captioned)
    return Job(recipe, family, base_hash, token, photos, texts, from_files, summary, resolution, masks, inputs)


def _photos(recipe: Recipe) -> tuple[list[Photo], str]:
    """The photos, and a sentence about those that were left out."""
    folder = recipe.data.photos
    photos, bad = sort_out(folder)
    if bad and not recipe.data.skip_bad:
        raise BadInput(f"in {folder} {bad}; mend or remove them, or leave them out with --skip-bad")
    if len(photos) > 1 and len({photo.digest for photo in photos}) == 1:
        raise BadInput(
            f"all {len(photos)} photos in {folder} are the same picture: give different photos of the subject"
        )
    return photos, f"{bad}; they are left out" if bad else ""


def _check_resolution(recipe: Recipe, resolution: int, family: Family) -> None:
    buckets = recipe.data.shape == "buckets"
    multiple = family.size_multiple if buckets else family.square_multiple
    if resolution % multiple:
        raise BadInput(
            f"data.resolution is {resolution}, which {family.name} can't divide by {multiple}"
            f"{' (as data.shape=buckets needs it)' if buckets else ''}: "
            f"choose {max(1, round(resolution / multiple)) * multiple}"
        )


def _refuse_inputs(recipe: Recipe, family: Family) -> None:
    """What can't be done with a base that reads more than latents."""
    if family.inputs is None:
        return
    if family.widened and (recipe.method.is_adapter or "denoiser" not in recipe.method.parts):
        raise BadInput(
            f"base.inputs={family.inputs} gives this base new weights, which only method.kind=full with the denoiser "
            "trains: choose that, or a base that has them"
        )
    if CHECKPOINT in recipe.export.formats:
        raise BadInput(
            f"export.formats has {CHECKPOINT!r}, which can't hold a base with {family.inputs} inputs: use folder"
        )
    if isinstance(recipe.prior, ClassImages) and not registry()[family.inputs].any_picture:
        raise BadInput(
            f"prior.kind is class_images but the base reads {family.inputs} inputs, which class images have not: set "
            "prior.kind=none"
        )


def _refuse_long(recipe: Recipe, family: Family, captioned: list[Captioned]) -> None:
    """Captions that the text encoders would not read to their end."""
    if recipe.data.long_captions == "cut":
        return
    length = max(family.text_length(index) for index in range(len(family.tokenizers)))
    readers = [family.tokenizers[n] for n in range(len(family.tokenizers)) if family.text_length(n) == length]
    long = [
        item.photo.path.name
        for item in captioned
        if any(len(tokenizer(text)["input_ids"]) > length for tokenizer in readers for text in item.captions)
    ]
    if long:
        raise BadInput(
            f"the captions of {', '.join(long)} are longer than the {length} tokens that the text encoder reads: "
            "shorten them, or set data.long_captions=cut"
        )


def _token(recipe: Recipe, family: Family) -> str:
    token, most = recipe.data.token, recipe.data.token_pieces
    if token != "auto":
        pieces = max(tokens.describe(family.word_tokenizers, token).pieces, key=len)
        if len(pieces) > most:
            raise BadInput(
                f"the token {token!r} is {len(pieces)} pieces to this base ({' + '.join(pieces)}), each with a "
                f"meaning: find one with `finetune tokens suggest`, or allow it with data.token_pieces={len(pieces)}"
            )
        return token
    found = tokens.suggest(family, 1, recipe.data.class_noun)
    if not found:
        raise BadInput("no rare token was found in this base's tokenizer: give one with data.token=TOKEN")
    return found[0].text


def plan(job: Job) -> dict[str, Any]:
    """The run in numbers: what is seen how often, what is trained, what it costs in class images."""
    recipe = job.recipe
    seen = recipe.run.steps * recipe.run.batch_size
    times = seen / len(job.photos)
    if recipe.data.shape == "buckets":
        times = recipe.run.steps / _groups(job)
    rows: dict[str, Any] = {
        "base": f"{recipe.base.source} ({job.family.name}, {job.family.schedule.prediction})",
        "subject": job.caption_summary,
        "training prompts": list(dict.fromkeys(text for texts in job.captions for text in texts))[:5],
        "token": f"{job.token} (class noun: {job.noun or 'none'})",
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
        rows["class images"] = (
            f"{recipe.prior.count} of {job.class_prompt!r}, each seen {seen / recipe.prior.count:.1f} times"
        )
    method = recipe.method
    if cost := recipe.prior.cost(method, job.family, job.class_prompt):
        rows["prior"] = cost
    rows["method"] = f"{method.kind} on {', '.join(method.part_names(job.family))}"
    rows["precision"] = resolve_precision(recipe.run)
    return rows


def _groups(job: Job) -> int:
    """Steps in which every photo is seen once, with buckets."""
    return group_count(list(Counter(job.sizes).values()), job.recipe.run.batch_size)


def _shape_rows(job: Job) -> dict[str, str]:
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


def _most_cut(job: Job, sizes: list[Size]) -> tuple[float, str]:
    """The largest share of a photo that its crop cuts away, and that photo's name."""
    cut = [(cut_away(photo.size, size), photo.path.name) for photo, size in zip(job.photos, sizes, strict=True)]
    return max(cut)
