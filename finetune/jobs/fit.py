"""From a prepared run to trained weights: class images, caches, the method, and the loop with its previews."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from accelerate import Accelerator
from torch import nn

from finetune.core.signals import Stop
from finetune.data.cache import PromptCache
from finetune.data.samplers import Sample
from finetune.jobs.dataset import cache_latents, make_batches, make_prompt_encoder, make_streams
from finetune.jobs.images import draw_preview, preview_folder
from finetune.jobs.nodes import refuse_other_class_images
from finetune.jobs.pins import Pins
from finetune.jobs.prepare import Prepared
from finetune.jobs.sharded import hollowed, is_cut, put_together
from finetune.jobs.verdicts import make_watch
from finetune.objectives.registry import build_objective
from finetune.report.pictures import CLASS_IMAGES, OTHER_IMAGES, keep_class_images
from finetune.runs.folder import RunFolder
from finetune.training.fast import is_worthwhile, quickened
from finetune.training.peers import joined
from finetune.training.regularizers import PriorContext
from finetune.training.step import PromptEncoder, Step, StepOptions, parts_of
from finetune.training.trainer import Trainable, Trainer


def fit_job(
    job: Prepared,
    folder: RunFolder,
    accelerator: Accelerator,
    on_step: Callable[[int], None] = lambda step: None,
    stop: Stop | None = None,
    pins: Pins | None = None,
) -> None:
    """Draws class images, fills the caches, attaches the method and trains. `job.family` holds the trained weights.

    `on_step` is called after every step, with the number of steps done. `stop` ends the loop after its current step.

    Raises:
        BadInput: the class images, or a checkpoint in `folder`, can't be used.
        CheckFailed: the loss or gradient of a step was not finite.
        Interrupted: `stop` was requested, or a signal arrived.
    """
    recipe, family = job.recipe, job.family
    streams = make_streams(job)
    _keep(streams, folder, accelerator, pins)
    cache = cache_latents(job, streams)
    encode_prompts = make_prompt_encoder(job, streams)
    watch = make_watch(job, streams, cache, encode_prompts, accelerator.is_main_process)
    idle = _idle_parts(job, encode_prompts)
    trained = _attach(job, idle)
    batches = make_batches(job, streams, cache)
    trainer = Trainer(
        _make_step(job, dict(trained.parameters), encode_prompts, batches.samples_per_step),
        trained,
        recipe.optim,
        recipe.run,
        accelerator,
        folder.checkpoints,
    )
    previews = _Previews(job, folder, trainer, idle, accelerator.is_main_process)

    def after_step(step: int) -> None:
        previews.after_step(step)
        watch.after_step(step)
        on_step(step)

    def after_restore(step: int) -> None:
        previews.after_restore(step)
        watch.after_restore(step)

    denoiser = family.parts["denoiser"]
    device, compiled = accelerator.device, recipe.run.compile == "regional"
    wanted = not is_cut(recipe.run) and is_worthwhile(recipe.run.fast, device, denoiser, compiled)
    busy = [part for name, part in family.parts.items() if name not in idle]
    with quickened(busy, wanted, accelerator.num_processes, device):
        if watch.due:
            watch.begin(folder, trainer, encode_prompts)
        trainer.fit(batches, after_step, stop, after_restore)
    put_together(job, trainer)
    family.parts.restore(idle)


def _attach(job: Prepared, idle: Sequence[str]) -> Trainable:
    """Releases the idle parts, places the others on the device, and attaches the method to them."""
    recipe, family = job.recipe, job.family
    fill = hollowed(job, idle) if is_cut(recipe.run) else None
    family.parts.release(idle)
    if not is_cut(recipe.run):  # its trained parts go to the device block by block
        family.parts.place([part for part in family.parts if part not in idle])
    trained = recipe.method.attach(family, recipe.run.seed)
    if recipe.run.gradient_checkpointing:
        family.enable_gradient_checkpointing(recipe.method.part_names(family))
    return Trainable(trained, recipe.method.windows(trained), fill)


def _keep(streams: Sequence[Sequence[Sample]], folder: RunFolder, accelerator: Accelerator, pins: Pins | None) -> None:
    """Checks the images of the prior against those that the run began with, and keeps small copies for its page."""
    if accelerator.is_main_process and pins is not None:
        pins.check_class_images(streams, folder.checkpoints.newest_step())
    if accelerator.is_main_process:
        for role, name in (("class", CLASS_IMAGES), ("other", OTHER_IMAGES)):
            files = [s.crops[0].photo.path for stream in streams for s in stream if s.role == role]
            keep_class_images(folder.path, files, name)
    refuse_other_class_images(streams, joined())


@dataclass(frozen=True)
class _Previews:
    """The images that a run draws every `sample.every` steps. The main process draws them while the others wait.

    `idle`: the parts that are not in memory during the loop.
    """

    job: Prepared
    folder: RunFolder
    trainer: Trainer
    idle: Sequence[str]
    is_main: bool

    def after_step(self, step: int) -> None:
        if self._is_due(step):
            self._draw(step)

    def after_restore(self, step: int) -> None:
        """Draws the preview that is missing if a kill or a stop came between the checkpoint and its preview."""
        if self._is_due(step) and joined().from_first(not preview_folder(self.folder, step).is_dir()):
            self._draw(step)

    def _is_due(self, step: int) -> bool:
        every = self.job.recipe.sample.every
        return bool(every) and step % every == 0

    def _draw(self, step: int) -> None:
        if self.is_main:
            with self.trainer.result_weights():
                draw_preview(self.job, self.folder, step, self.idle)
        joined().wait()


def _make_step(
    job: Prepared, trained: dict[str, nn.Parameter], encode_prompts: PromptEncoder, samples_per_step: int
) -> Step:
    """The forward pass of the recipe: objective, regularizers, dropout of text encoders."""
    recipe, family = job.recipe, job.family
    class_prompts = job.class_prompt, job.class_prompts, job.class_prompt_of_caption
    context = PriorContext(family, recipe.method, trained, encode_prompts, *class_prompts)
    options = StepOptions(
        recipe.data.encoder_dropout,
        recipe.prior.regularizers(context),
        samples_per_step if recipe.objective.timesteps == "stratified" else None,
        recipe.prior.teacher(context),
    )
    objective = build_objective(recipe.objective, family.schedule, family.shift(job.resolution))
    return Step(family, parts_of(trained), objective, encode_prompts, options)


def _idle_parts(job: Prepared, encode_prompts: PromptEncoder) -> list[str]:
    """Frozen parts whose outputs are cached. They are removed from memory during the training loop."""
    busy = {"denoiser", *job.recipe.method.part_names(job.family)}
    cached = isinstance(encode_prompts, PromptCache)
    return [part for part in job.family.parts if part not in busy and (part in job.family.codec.parts or cached)]
