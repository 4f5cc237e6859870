"""Prepares a run: reads photos, captions, token and base, and checks them before anything is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from finetune.config.recipe import Recipe
from finetune.core.errors import BadInput
from finetune.core.events import one_step
from finetune.data.buckets import Size, bucket_table, nearest_bucket
from finetune.data.captions import Words
from finetune.data.conditioning.base import Choices, Inputs, make_inputs
from finetune.data.masks import Mask
from finetune.data.photos import Photo
from finetune.export.registry import check_formats
from finetune.families.base import Family
from finetune.families.digests import base_hash as base_hash_of
from finetune.families.toy import TINY
from finetune.jobs.class_sets import ClassSet, OtherSet, check_set
from finetune.jobs.neutral import given_prompts, other_prompts
from finetune.jobs.precision import base_dtype, computes_in, set_precision
from finetune.jobs.ready_made import READY_MADE
from finetune.jobs.refusals import (
    check_drawn,
    check_resolution,
    refuse_folder,
    refuse_formats,
    refuse_hold_out,
    refuse_inputs,
    refuse_useless,
)
from finetune.jobs.subjects import Subject, caption_subjects, emphasis, refuse_unclear, scan_subjects
from finetune.jobs.words import refuse_given_words, refuse_words
from finetune.objectives.registry import build_objective
from finetune.sampling.draw import check_sampling
from finetune.sampling.given import DrawnFrom, Given, open_given
from finetune.training.priors.base import CAPTION


@dataclass
class Prepared:
    """A recipe with its base and photos, read and checked, but before any training.

    There is at least one subject. `photos` and `captions` are those of all subjects, in the same order. `resolution`
    is in pixels.
    """

    recipe: Recipe
    family: Family
    base_hash: str
    subjects: list[Subject]
    resolution: int
    masks: dict[Path, Mask] = field(default_factory=dict)  # for the photos that have one
    inputs: Inputs | None = None  # what the base reads besides its latents
    drawn_from: DrawnFrom | None = None  # what `sample:` names to draw from

    @cached_property
    def photos(self) -> list[Photo]:
        """The photos of all subjects."""
        return [photo for subject in self.subjects for photo in subject.photos]

    @cached_property
    def captions(self) -> list[list[str]]:
        """The possible captions of each photo."""
        return [item.captions for subject in self.subjects for item in subject.captioned]

    @cached_property
    def shares(self) -> list[tuple[float, ...]]:
        """How often each caption of a photo is drawn; empty where all are drawn equally often."""
        return [item.shares for subject in self.subjects for item in subject.captioned]

    @cached_property
    def triggers(self) -> list[str]:
        """The words of each photo's subject that call a style, or empty."""
        return [subject.trigger for subject in self.subjects for _ in subject.captioned]

    @cached_property
    def emphasis(self) -> list[tuple[int, float]]:
        """How often each photo is in an epoch, and its loss weight."""
        named = zip(self.subjects, self.recipe.data.all_subjects, strict=True)
        pairs = (emphasis(settings, [photo.path.name for photo in subject.photos]) for subject, settings in named)
        return [pair for many, weights in pairs for pair in zip(many, weights, strict=True)]

    @property
    def captions_from_files(self) -> int:
        """The number of photos whose caption comes from a file."""
        return sum(item.source == "file" for subject in self.subjects for item in subject.captioned)

    @cached_property
    def names(self) -> list[str]:
        """The name of each photo in messages. Every name is different."""
        several = len(self.subjects) > 1
        return [
            f"{photo.path.name} of {subject.token}" if several else photo.path.name
            for subject in self.subjects
            for photo in subject.photos
        ]

    @property
    def token(self) -> str:
        """The token of the first subject."""
        return self.subjects[0].token

    @property
    def noun(self) -> str | None:
        """The class noun of the first subject."""
        return self.subjects[0].noun

    def class_prompt_of(self, subject: Subject) -> str:
        """Returns the class prompt of a subject, or an empty text if the prior has none."""
        return subject.fill(next(iter(self.recipe.prior.prompts), ""))

    @cached_property
    def plain_captions(self) -> list[list[str]]:
        """The prior's class prompts of each photo: its captions without the trigger. Empty without such a prior."""
        if not self.recipe.prior.of_captions:
            return []
        return [
            [self.class_prompt_of(subject).replace(CAPTION, text or "") for text in item.plain]
            for subject in self.subjects
            for item in subject.captioned
        ]

    @property
    def class_captions(self) -> tuple[str, ...]:
        """Every different one of `plain_captions`, sorted."""
        return tuple(sorted({text for texts in self.plain_captions for text in texts}))

    @property
    def class_nouns(self) -> dict[str, str | None]:
        """Class prompt -> noun, for each different class prompt, in the order of the subjects."""
        if self.recipe.prior.of_captions:
            return dict.fromkeys(self.class_captions)
        nouns: dict[str, str | None] = {}
        for subject in self.subjects:
            nouns.setdefault(self.class_prompt_of(subject), subject.noun)
        return nouns

    @property
    def class_prompts(self) -> dict[str, str]:
        """Name of a photo (see `names`) -> class prompt of its subject, or of the photo itself."""
        if self.recipe.prior.of_captions:
            return {name: texts[0] for name, texts in zip(self.names, self.plain_captions, strict=True)}
        prompts = [self.class_prompt_of(subject) for subject in self.subjects for _ in subject.photos]
        return dict(zip(self.names, prompts, strict=True))

    @property
    def class_prompt_of_caption(self) -> dict[tuple[str, str], str]:
        """(name of a photo, one of its captions) -> that caption without the trigger. Empty without such a prior."""
        if not self.recipe.prior.of_captions:
            return {}
        photos = zip(self.names, self.captions, self.plain_captions, strict=True)
        return {(name, text): bare for name, texts, plain in photos for text, bare in zip(texts, plain, strict=True)}

    @property
    def class_prompt(self) -> str:
        """The class prompt of the first subject."""
        return self.class_prompt_of(self.subjects[0])

    def sample_prompts(self) -> list[str]:
        """Returns the sample prompts. A prompt with {token} or {noun} is repeated for each subject."""
        return [
            prompt
            for template in self.recipe.sample.prompts
            for prompt in dict.fromkeys(subject.fill(template) for subject in self.subjects)
        ]

    def files_beside(self, photo: Photo) -> dict[str, Path]:
        """What is read beside a photo: its mask's file, a depth map, ..."""
        mask = self.masks.get(photo.path)
        own = {} if mask is None or mask.alpha else {"mask": mask.file}
        return own | (self.inputs.files(photo) if self.inputs else {})

    @cached_property
    def sizes(self) -> list[Size]:
        """The training size (width, height) of each photo, in pixels."""
        if self.recipe.data.shape == "square":
            return [(self.resolution, self.resolution)] * len(self.photos)
        return self.bucket_sizes()

    def bucket_sizes(self) -> list[Size]:
        """Returns the bucket (width, height) of each photo, in pixels."""
        table = bucket_table(self.resolution, self.family.size_multiple, self.recipe.data.bucket_tolerance)
        nearest = {size: nearest_bucket(size, table) for size in {photo.size for photo in self.photos}}
        return [nearest[photo.size] for photo in self.photos]


def prepare(recipe: Recipe, device: torch.device | str = "cpu", begun: bool = False) -> Prepared:
    """Reads the photos, loads the base for use on `device`, and chooses the token and the captions. Writes nothing.

    With `begun`, a run of this recipe already exists: its settings are not checked again for effect.

    Raises:
        BadInput: the photos, captions, base or token can't be used, or a setting has no effect with this base.
    """
    if not begun:
        refuse_given_words(recipe)
    scanned = scan_subjects(recipe.data)
    images = recipe.prior.class_images
    refuse_hold_out(recipe, scanned, begun)
    if images is not None:
        refuse_folder(images, recipe)
    if recipe.prior.others is not None:
        given_prompts(recipe.prior.others)
    check_formats(recipe.export.formats, recipe.method.artifacts)
    with one_step("Base"):
        family = recipe.base.load(base_dtype(recipe))
    resolution = recipe.data.resolution or family.resolution
    check_resolution(recipe, resolution, family)
    if recipe.data.encoder_dropout and len(family.text_encoders) == 1:
        raise BadInput(
            f"data.encoder_dropout is {recipe.data.encoder_dropout} but {family.name} has one text encoder: use "
            "data.caption_dropout"
        )
    refuse_inputs(recipe, family, scanned)
    refuse_formats(recipe, family)
    recipe.method.check_fits(family)
    check_sampling(family, recipe.sample.sampling(resolution), "sample.")
    check_drawn(recipe, family, resolution)
    choices = Choices(recipe.run.seed, recipe.data.mask_count, recipe.data.edit_dropout, recipe.sample.image_guidance)
    inputs = make_inputs(family, [photo for found in scanned for photo in found.photos], choices)
    family.parts.device = torch.device(device)
    set_precision(family, recipe)
    family.parts.keep_released = recipe.run.released == "cpu"
    build_objective(recipe.objective, family.schedule, family.shift(resolution))
    if not begun:
        refuse_useless(recipe, family)
    subjects = caption_subjects(recipe, family, scanned)
    if recipe.prior.of_captions:
        refuse_unclear(subjects)
    if not begun:
        refuse_words(recipe, family, subjects)
    masks = {path: mask for subject in subjects for path, mask in subject.masks.items()}
    base_hash = base_hash_of(family.folder)
    named = _named_images(recipe, family, resolution)
    job = Prepared(recipe, family, base_hash, subjects, resolution, masks=masks, inputs=inputs, drawn_from=named)
    _check_sets(job, begun)
    return job


def _check_sets(job: Prepared, begun: bool) -> None:
    """Checks the images of the prior that are there already, and that some are of anything but the subject."""
    for wanted in class_sets(job):
        check_set(wanted, [] if begun else job.photos)
    others = other_set(job)
    if others is not None:
        check_set(others)
        used_others(job, others)


def _named_images(recipe: Recipe, family: Family, resolution: int) -> DrawnFrom | None:
    sample = recipe.sample
    if not sample.files:
        return None
    given = Given(sample.image, sample.mask, sample.depth)
    return open_given(family, given, sample.sampling(resolution), "sample.", sample.image_guidance)


def class_sets(job: Prepared) -> list[ClassSet]:
    """The class images of the prior, as this base draws them: a set for each noun, or one for all captions."""
    images = job.recipe.prior.class_images
    if images is None:
        return []
    common = (job.resolution, job.base_hash, _particulars(job.family, images.negative))
    precision = computes_in(job.family)
    if job.class_captions:
        return [ClassSet(images, "", *common, job.class_captions, precision)]
    return [ClassSet(images, noun or "", *common, precision=precision) for noun in job.class_nouns.values()]


def _particulars(family: Family, negative: str) -> dict[str, Any]:
    """How this base is drawn in another way than most, and what of its files is not what draws."""
    left_out = {"without": family.left_out} if family.left_out else {}
    inputs = {"inputs": family.inputs} if family.widened else {}
    return family.drawing.particulars(negative) | left_out | inputs


def other_set(job: Prepared) -> OtherSet | None:
    """The images of everything else, as this base draws them; None if the recipe has none.

    Raises:
        BadInput: its prompts can't be used.
    """
    others = job.recipe.prior.others
    if others is None:
        return None
    prompts = other_prompts(others, job.family.folder)
    return OtherSet(
        prior=others.drawn_as,
        noun="",
        resolution=job.resolution,
        base_hash=job.base_hash,
        particulars=_particulars(job.family, ""),
        captions=prompts.texts,
        precision=computes_in(job.family),
        empty=others.empty,
        ready_made=job.family.folder / READY_MADE if job.recipe.base.source == TINY else None,
    )


def used_others(job: Prepared, wanted: OtherSet) -> list[int]:
    """The numbers of the images of everything else whose prompts name no token of the run.

    Raises:
        BadInput: there is none.
    """
    words = [Words(subject.token, subject.noun) for subject in job.subjects]
    prompts = [wanted.prompt_of(number) for number in range(wanted.prior.count)]
    used = [number for number, text in enumerate(prompts) if not any(word.names_token(text) for word in words)]
    if not used:
        raise BadInput(
            f"every prompt of prior.others has the token ({prompts[0]!r:.100}), so that no image is of anything else: "
            "give other prompts, or another data.token"
        )
    return used
