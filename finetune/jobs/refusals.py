"""What a run refuses before anything is written: settings that do not go with its photos, its base, or each other.

Every function here raises `BadInput`, with what to do instead.
"""

from __future__ import annotations

from collections.abc import Sequence

from finetune.config.recipe import Recipe
from finetune.core.errors import BadInput
from finetune.data.conditioning.base import INPUTS
from finetune.export.registry import model_exports
from finetune.families.base import Family
from finetune.jobs.base_effect import without_effect_on
from finetune.jobs.subjects import Scanned
from finetune.sampling.draw import check_sampling
from finetune.sampling.settings import Sampling
from finetune.training.priors.class_images import ClassImages
from finetune.verdicts.due import due_steps, samples_in_step


def check_drawn(recipe: Recipe, family: Family, resolution: int) -> None:
    """Refuses settings with which the base can't draw the images of the prior."""
    images, others = recipe.prior.class_images, recipe.prior.others
    for key, own in (("prior.", images), ("prior.others.", others.drawn_as if others else None)):
        if own is not None:
            check_sampling(family, Sampling("", own.sampler, own.steps, own.guidance, resolution), key)


def refuse_hold_out(recipe: Recipe, scanned: Sequence[Scanned], begun: bool) -> None:
    """Refuses to hold out all photos of a subject, and to do it for nothing."""
    count = recipe.data.hold_out
    if count and recipe.run.verdicts == "off":
        raise BadInput(
            f"data.hold_out is {count} but run.verdicts is off, so nothing is measured on them: remove one of the two"
        )
    for found in scanned:
        if count >= len(found.photos):
            raise BadInput(
                f"data.hold_out is {count} but {found.folder} has {len(found.photos)} photos: at least one must be "
                "left to train on"
            )
    if count and not begun and not due_steps(recipe.run, samples_in_step(recipe.run, recipe.prior)):
        raise BadInput(
            f"data.hold_out is {count} but {recipe.run.steps} steps are too few for run.verdicts=auto to measure "
            "anything on the photos: set run.verdicts=on, or remove data.hold_out"
        )


def refuse_folder(images: ClassImages, recipe: Recipe) -> None:
    """Refuses class images that are in no folder, or are the subject itself."""
    folder = images.folder
    if folder is not None and folder.exists() and not folder.is_dir():
        raise BadInput(f"prior.folder is {str(folder)!r}, which is a file: give a folder of class images")
    if folder is not None and any(folder.absolute() == subject.photos for subject in recipe.data.all_subjects):
        raise BadInput(
            f"prior.folder is {str(folder)!r}, which holds the subject's photos: give a folder with images of others "
            "of its class, or leave it out, so that they are drawn"
        )


def refuse_useless(recipe: Recipe, family: Family) -> None:
    """Refuses settings that have no effect with this base."""
    for useless in without_effect_on(family, recipe):
        raise BadInput(useless)


def check_resolution(recipe: Recipe, resolution: int, family: Family) -> None:
    """Refuses a resolution in pixels that the base can't have."""
    buckets = recipe.data.shape == "buckets"
    multiple = family.size_multiple if buckets else family.square_multiple
    if resolution % multiple:
        raise BadInput(
            f"data.resolution is {resolution}, but {family.name} needs a multiple of {multiple}"
            f"{' (with data.shape=buckets)' if buckets else ''}: "
            f"choose {max(1, round(resolution / multiple)) * multiple}"
        )


def refuse_inputs(recipe: Recipe, family: Family, scanned: Sequence[Scanned]) -> None:
    """Refuses what does not work with a base that reads extra inputs."""
    if family.inputs is None:
        return
    if family.widened and (recipe.method.is_adapter or "denoiser" not in recipe.method.parts):
        raise BadInput(
            f"base.inputs={family.inputs} adds new weights to this base, and only method.kind=full with the denoiser "
            "trains them: use that method, or a base that already reads these inputs"
        )
    if recipe.data.subjects:
        raise BadInput(
            f"data.subjects has further subjects but the base reads {family.inputs} inputs, so its images are "
            "drawn from the photo of one subject: train each subject in a run of its own"
        )
    if INPUTS[family.inputs].any_image:
        return
    if any(found.table for found in scanned):
        raise BadInput(
            f"data.photos is a data set but the base reads {family.inputs} inputs, which lie beside photos as files: "
            "give a folder of photos"
        )
    if recipe.prior.class_images is not None:
        raise BadInput(
            f"prior.kind is {recipe.prior.kind} but the base reads {family.inputs} inputs, which class images do "
            "not have: set prior.kind=none"
        )
    if recipe.prior.others is not None:
        raise BadInput(
            f"prior.others is given but the base reads {family.inputs} inputs, which its images do not have: leave it "
            "out"
        )


def refuse_formats(recipe: Recipe, family: Family) -> None:
    """Refuses, before training, formats of whole models that can't hold this base."""
    for export in model_exports(recipe.export.formats):
        obstacle = export.obstacle(family)
        if obstacle:
            raise BadInput(f"export.formats has {export.name!r}, which can't hold {obstacle}: use folder")
