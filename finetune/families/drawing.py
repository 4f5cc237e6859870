"""What draws: a diffusers pipeline around the family's own modules, and what it is called with."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import diffusers
from torch import Tensor

from finetune.families.schedulers import make_scheduler

if TYPE_CHECKING:
    from finetune.families.base import Family

GUIDANCE_RESCALE = 0.7  # phi of arXiv:2305.08891 section 3.4


@dataclass(frozen=True)
class ImageCondition:
    """What an image is drawn from, by bases that draw from images.

    `picture` [3, H, W] and `beside` [1, H, W] (the mask of what is painted, or a depth map) are in [0, 1];
    `guidance` is how closely an edit keeps to the image (arXiv:2211.09800 eq. 3).
    """

    image: Tensor
    beside: Tensor | None = None
    guidance: float = 1.5


class Drawing(ABC):
    """How a family draws images from prompts."""

    @abstractmethod
    def pipeline(self, sampler: str | None = None) -> Any:
        """The diffusers pipeline around these very modules (adapted, if they are). Released parts are read again."""

    @abstractmethod
    def check_sampler(self, sampler: str) -> None:
        """Raises BadInput for a sampler that this base can't be drawn with."""

    def arguments(self, guidance: float, negatives: Sequence[str]) -> dict[str, Any]:
        """What the pipeline is called with for a guidance scale and one negative prompt for each image."""
        return {"guidance_scale": guidance, "negative_prompt": list(negatives)}

    def inputs(self, side: int, count: int, steps: int, given: ImageCondition | None) -> dict[str, Any]:
        """What the pipeline is called with for `count` images of this side length in pixels; `given`: what they are
        drawn from, by families that draw from images (None: from nothing)."""
        return {"width": side, "height": side}


class DiffusersDrawing(Drawing):
    """A pipeline of diffusers, made of the family's parts by the names of their folders."""

    def __init__(self, family: Family, scheduler: Any) -> None:
        """`scheduler`: the base's own."""
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
        known = inspect.signature(getattr(diffusers, self.pipeline_name()).__call__).parameters
        if self.scheduler.config.get("rescale_betas_zero_snr") and "guidance_rescale" in known:
            given["guidance_rescale"] = GUIDANCE_RESCALE
        return given

    def pipeline_name(self) -> str:
        return self.family.pipeline_class

    def extras(self) -> dict[str, Any]:
        """Further arguments of the pipeline's class: what it asks for and the family does not have."""
        return {}

    def _parts(self) -> dict[str, Any]:
        """Models and tokenizers by the names of the pipeline's arguments: those of the folder; None if left out."""
        family = self.family
        models: dict[str, Any] = {source.folder: family.parts.get(name) for name, source in family.sources.items()}
        names = [name for name in family.sources if name.startswith("text_encoder")]
        tokenizers = dict(zip(family.text_encoders, family.tokenizers, strict=True))
        return models | {name.replace("text_encoder", "tokenizer"): tokenizers.get(name) for name in names}
