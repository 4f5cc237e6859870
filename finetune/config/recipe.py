"""The recipe: the settings of all packages in one strict model, and the combinations that it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import PrivateAttr, TypeAdapter, model_validator

from finetune.config.profiles import ProfileSettings, rows
from finetune.core.settings import Settings
from finetune.data.settings import Data
from finetune.export.settings import ExportTo
from finetune.families.settings import Base
from finetune.methods.registry import MethodSettings
from finetune.objectives.settings import ObjectiveSettings
from finetune.optim.registry import Optim
from finetune.sampling.settings import SampleSettings
from finetune.training.priors.none import NoPrior
from finetune.training.priors.registry import Prior
from finetune.training.settings import Run


@dataclass(frozen=True)
class Origin:
    """What is known of how a recipe was read. It is no setting, so any two are equal.

    borrowed: lines about words for the subject that nobody gave (`finetune.config.placeholders`).
    """

    borrowed: tuple[str, ...] = field(default=(), compare=False)


class Recipe(Settings):
    """Everything that a run depends on. `RUN/recipe.yaml` holds it with every default filled in."""

    _origin: Origin = PrivateAttr(default=Origin())

    base: Base = Base()
    data: Data
    prior: Prior = NoPrior()
    method: MethodSettings
    objective: ObjectiveSettings = ObjectiveSettings()
    optim: Optim
    run: Run = Run()
    sample: SampleSettings = SampleSettings()
    export: ExportTo = ExportTo()
    profile: ProfileSettings = ProfileSettings()

    @property
    def borrowed(self) -> tuple[str, ...]:
        """Lines about words for the subject that are a shipped recipe's example, while the photos are not."""
        return self._origin.borrowed

    def read_with(self, borrowed: Sequence[str]) -> Recipe:
        """The same recipe, which knows that it has these `borrowed` words."""
        copy = self.model_copy()
        copy._origin = Origin(tuple(borrowed))
        return copy

    @property
    def leaves_as_trained(self) -> bool:
        """Whether exports hold exactly the trained weights, so that no SVD converts them to a LoRA."""
        return self.method.adapter.low_rank or self.method.artifacts == ("embedding",)

    @property
    def defaults(self) -> str:
        """The settings that its profile filled in, with their values and where these come from; "" without one."""
        return "; ".join(rows(self.profile.filled, self.model_dump(mode="json"))) if self.profile.filled else ""

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        _check_training(self)
        if self.run.weights == "bf16":
            _check_bf16(self)
        if self.run.shard:
            _check_shard(self)
        _check_prior(self)
        _check_words(self)
        return self


def _check_training(recipe: Recipe) -> None:
    """Refuses what does not fit together of method, optimiser, run and export. Like the checks below it raises the
    ValueError that pydantic expects."""
    method, optim, run = recipe.method, recipe.optim, recipe.run
    if run.batch_size % run.accumulate:
        raise ValueError(
            f"run.batch_size {run.batch_size} can't be split into run.accumulate {run.accumulate} "
            "equal micro-batches: make it a multiple"
        )
    if optim.text_lr is not None and not method.has_text_lr:
        raise ValueError("optim.text_lr is set but method.parts has no text_encoders: add them, or leave text_lr out")
    if optim.averages and run.ema is not None:
        raise ValueError(
            f"run.ema is {run.ema} but optim.kind {optim.kind} averages the weights itself: leave run.ema out"
        )
    if method.rests and not optim.windows:
        raise ValueError(
            f"optim.kind {optim.kind} changes weights that method.kind {method.kind} does not train in "
            "every step: use optim.kind=adamw"
        )
    if recipe.export.rank is not None and recipe.leaves_as_trained:
        raise ValueError(
            f"export.rank is {recipe.export.rank} but a {method.kind} is exported exactly as it was trained: "
            "leave it out, or make the file smaller with `finetune resize`"
        )


def _check_bf16(recipe: Recipe) -> None:
    """Refuses what does not train in weights that are bf16."""
    method, optim, run, prior = recipe.method, recipe.optim, recipe.run, recipe.prior
    if not method.holds_bf16:
        raise ValueError(
            f"run.weights is bf16 but method.kind {method.kind} trains an adapter, whose few weights stay in fp32: "
            "leave it out, or use method.kind=full"
        )
    if run.precision not in ("auto", "bf16"):
        raise ValueError(
            f"run.weights is bf16 but run.precision is {run.precision}: set run.precision=bf16, or leave "
            "run.weights out"
        )
    if optim.whole:
        raise ValueError(
            f"run.weights is bf16 but optim.kind {optim.kind} {optim.whole}: use adamw, adamw8bit, lion8bit or "
            "paged_adamw8bit"
        )
    if run.shard:
        raise ValueError("run.weights=bf16 was not tried on weights that run.shard cuts: leave one of them out")
    if prior.needs_distance:
        raise ValueError(
            f"run.weights is bf16, whose steps are coarser than the changes that prior.kind {prior.kind} measures: "
            "use another prior, or leave run.weights out"
        )


def _check_shard(recipe: Recipe) -> None:
    """Refuses what does not work on a part of each weight, or what one process would compute alone."""
    method, optim, run, prior = recipe.method, recipe.optim, recipe.run, recipe.prior
    if not method.shards:
        raise ValueError(f"run.shard can't cut the weights of method.kind {method.kind}: use lora or full")
    if optim.shards == "none":
        raise ValueError(
            f"run.shard can't cut the state of optim.kind {optim.kind}: use adamw, adamw8bit, lion8bit or "
            "schedule_free"
        )
    if prior.taught or (prior.others is not None and prior.keeps_base):
        raise ValueError(
            "run.shard can't ask the frozen base about a part of a batch, as the prior does here: give prior.target "
            "and prior.others.target the value images, and leave prior.others out beside prior.kind=frozen_base"
        )
    if prior.needs_distance or (prior.keeps_base and not method.is_adapter):
        raise ValueError(
            f"run.shard can't cut the weights that prior.kind {prior.kind} compares with: use prior.kind="
            "class_images, or frozen_base with method.kind=lora"
        )
    kernels = {"fast": run.fast == "on", "compile": run.compile != "off", "channels_last": run.channels_last}
    untried = next((name for name, given in kernels.items() if given), None)
    if untried is not None:
        raise ValueError(f"run.{untried} was not tried on weights that run.shard cuts: leave it out")
    if run.precision == "fp16":
        raise ValueError("run.shard has no loss scaling, which run.precision fp16 needs: use bf16 or fp32")
    alone = {
        "sample.every": bool(recipe.sample.every),
        "run.verdicts": run.verdicts == "on",
        "run.verdicts_every": run.verdicts_every is not None,
        "run.keep_best": run.keep_best,
        "data.hold_out": bool(recipe.data.hold_out),
    }
    named = next((name for name, given in alone.items() if given), None)
    if named is not None:
        raise ValueError(f"{named} needs the whole model on one process, which run.shard cuts: leave it out")


def _check_prior(recipe: Recipe) -> None:
    """Refuses a prior that does not fit the method or the data."""
    method, prior = recipe.method, recipe.prior
    if any("{token}" in prompt for prompt in prior.prompts):
        raise ValueError("prior.prompt has {token}, but it must name the class without the subject: use {noun} alone")
    if prior.others is not None and method.artifacts == ("embedding",):
        raise ValueError(
            f"prior.others is given but method.kind {method.kind} trains only a new word, which changes no "
            "prompt without it: leave prior.others out, or set prior.others=null"
        )
    if prior.needs_distance and not method.measures_distance:
        raise ValueError(
            f"prior.kind is {prior.kind}, which method.kind {method.kind} does not measure: use "
            "prior.kind=frozen_base, or method.kind=lora"
        )
    if prior.of_captions and recipe.data.shuffle_tags:
        raise ValueError(
            "prior.prompt has {caption}, each caption without the trigger, but data.shuffle_tags draws other orders "
            "of it: leave one of them out"
        )
    if prior.of_captions and not recipe.data.trigger:
        raise ValueError(
            "prior.prompt has {caption}, which is each caption without the words of data.trigger: give them, such "
            "as data.trigger='in {token} style'"
        )


def _check_words(recipe: Recipe) -> None:
    """Refuses templates with {noun} where there is none."""
    data, prompts = recipe.data, recipe.prior.prompts
    noun_needed = any("{noun}" in text for text in (*data.templates, data.trigger, *prompts))
    if data.class_noun is None and data.trigger and any("{noun}" in prompt for prompt in prompts):
        raise ValueError(
            "prior.prompt has {noun}, but a style has no class noun: set prior.prompt='{caption}', which is each "
            "caption without the style's words"
        )
    if data.class_noun is None and noun_needed:
        raise ValueError(
            "data.class_noun is missing but a template uses {noun}: say what the subject is, such as "
            "data.class_noun=dog"
        )
    if data.subjects:
        _check_subjects(recipe, noun_needed)


def _check_subjects(recipe: Recipe, noun_needed: bool) -> None:
    """Refuses what does not work with several subjects in one run. Raises the ValueError that pydantic expects."""
    subjects = recipe.data.all_subjects
    if "embedding" in recipe.method.artifacts:
        raise ValueError(
            f"data.subjects has further subjects but method.kind {recipe.method.kind} trains a word for only one: use "
            "method.kind=lora, or train each subject in a run of its own"
        )
    for subject in subjects:
        if noun_needed and subject.class_noun is None:
            raise ValueError(
                f"the subject in {subject.photos} has no class_noun but a template uses {{noun}}: say there what it "
                "is, such as class_noun: dog"
            )
    tokens = [subject.token.lower() for subject in subjects if subject.token != "auto"]  # CLIP ignores case
    twice = next((token for token in tokens if tokens.count(token) > 1), None)
    if twice is not None:
        raise ValueError(f"the token {twice!r} is given to two subjects: give each its own, or leave it out (auto)")
    folders = [subject.photos for subject in subjects]
    again = next((folder for folder in folders if folders.count(folder) > 1), None)
    if again is not None:
        raise ValueError(f"{again} holds the photos of two subjects: give each a folder of its own")
    images = recipe.prior.class_images
    if images and images.folder and len({s.class_noun for s in subjects}) > 1:
        raise ValueError(
            f"prior.folder is {str(images.folder)!r} but there are several class nouns: leave it out, so that "
            "each has its own class images"
        )


def json_schema() -> dict[str, Any]:
    """Returns the JSON schema of a recipe, for editors."""
    return TypeAdapter(Recipe).json_schema()
