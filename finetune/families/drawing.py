"""Draws images: builds a diffusers pipeline from the family's own modules, and its arguments."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import diffusers
from PIL import Image
from torch import Tensor

from finetune.families.schedulers import make_scheduler

if TYPE_CHECKING:
    from finetune.families.base import Family

GUIDANCE_RESCALE = 0.7  # phi of arXiv:2305.08891 section 3.4


@dataclass(frozen=True)
class ImageCondition:
    """The input image for bases that draw from images.

    `image` [3, H, W] is the image, and `beside` [1, H, W] the inpainting mask or the depth map, both in [0, 1].
    `guidance` is the image guidance scale: how closely an edit follows the image (arXiv:2211.09800 eq. 3).
    `strength`, in (0, 1], is the share of the noise that the image gets before it is drawn over (arXiv:2108.01073):
    for inpainting, depth and the SDXL refiner. None: inpainting starts from noise alone (1), the refiner from the
    image with .3, and a depth base does not see the image.
    """

    image: Tensor
    beside: Tensor | None = None
    guidance: float = 1.5
    strength: float | None = None


@dataclass(frozen=True)
class Wants:
    """What a base draws from besides the prompt. Names are of "image", "mask" and "depth", and of the numbers
    "image_guidance" and "strength"; `needed` must be given and `also` may be."""

    needed: tuple[str, ...] = ()
    also: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return self.needed + self.also


class Drawing(ABC):
    """How a family draws images from prompts."""

    @abstractmethod
    def pipeline(self, sampler: str | None = None) -> Any:
        """A diffusers pipeline of the family's current modules, adapters included. Released parts are loaded again.

        Raises:
            BadInput: this base can't be drawn with `sampler`.
        """

    @abstractmethod
    def check_sampler(self, sampler: str) -> None:
        """Checks that this base can be drawn with `sampler`.

        Raises:
            BadInput: it can't.
        """

    def arguments(self, guidance: float, negatives: Sequence[str]) -> dict[str, Any]:
        """The pipeline's arguments for a guidance scale and one negative prompt for each image."""
        return {"guidance_scale": guidance, "negative_prompt": list(negatives)}

    def particulars(self, negative: str) -> dict[str, Any]:
        """How this base is drawn in another way than most, by name. Images drawn otherwise are not taken for these."""
        return {}

    @property
    def wants(self) -> Wants:
        """What it draws from besides the prompt."""
        return Wants()

    @property
    def depth_estimator(self) -> Callable[[Image.Image], Tensor] | None:
        """Makes the depth map [1, h, w] of an RGB image, near is large, by a model in the base's folder; None if there
        is none. It raises BadInput if that model can't be used."""
        return None

    def inputs(self, side: int, count: int, steps: int, given: ImageCondition | None) -> dict[str, Any]:
        """The pipeline's arguments for `count` square images of `side` pixels, drawn in `steps` steps. `given`: the
        input image, for families that draw from images; None for a neutral one."""
        return {"width": side, "height": side}


class DiffusersDrawing(Drawing):
    """Draws with a diffusers pipeline, whose arguments are the family's parts under the names of their folders."""

    def __init__(self, family: Family, scheduler: Any) -> None:
        """`scheduler`: the base's own diffusers scheduler."""
        self.family, self.scheduler = family, scheduler

    def check_sampler(self, sampler: str) -> None:
        make_scheduler(self.scheduler, sampler)

    def pipeline(self, sampler: str | None = None) -> Any:
        parts = self.family.parts
        parts.restore()
        made = getattr(diffusers, self.pipeline_name())(
            **self._parts(), scheduler=make_scheduler(self.scheduler, sampler), **self.extras()
        )
        made.set_progress_bar_config(disable=True)
        if parts.fit():
            parts.place(list(parts))
        else:
            parts.place([])
            made.enable_model_cpu_offload(device=parts.device)
        return made

    def arguments(self, guidance: float, negatives: Sequence[str]) -> dict[str, Any]:
        """A base whose last timestep has no signal gets its guidance rescaled (arXiv:2305.08891 section 3.4), by the
        pipelines that can."""
        given = super().arguments(guidance, negatives)
        return given | ({"guidance_rescale": GUIDANCE_RESCALE} if self._rescales() else {})

    def particulars(self, negative: str) -> dict[str, Any]:
        return {"guidance_rescale": GUIDANCE_RESCALE} if self._rescales() else {}

    def _rescales(self) -> bool:
        known = inspect.signature(getattr(diffusers, self.pipeline_name()).__call__).parameters
        return bool(self.scheduler.config.get("rescale_betas_zero_snr")) and "guidance_rescale" in known

    def pipeline_name(self) -> str:
        """The name of the pipeline's class in diffusers."""
        return self.family.pipeline_class

    def extras(self) -> dict[str, Any]:
        """Arguments that the pipeline's class needs in addition to the family's parts."""
        return {}

    def _parts(self) -> dict[str, Any]:
        """Models and tokenizers by the names of the pipeline's arguments, which are folder names; None if left out."""
        family = self.family
        models: dict[str, Any] = {source.folder: family.parts.get(name) for name, source in family.sources.items()}
        names = [name for name in family.sources if name.startswith("text_encoder")]
        tokenizers = dict(zip(family.text_encoders, family.tokenizers, strict=True))
        return models | {name.replace("text_encoder", "tokenizer"): tokenizers.get(name) for name in names}
