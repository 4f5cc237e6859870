"""Prior preservation with class images (arXiv:2208.12242 eq. 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from finetune.core.settings import AnyPath, BatchSize
from finetune.sampling.settings import Sampler
from finetune.training.priors.base import PriorSettings
from finetune.training.priors.others import FORWARD, ComparedWith

if TYPE_CHECKING:
    from finetune.core.batch import Role
    from finetune.training.regularizers import PriorContext, Regularizer


class ClassImages(PriorSettings):
    """Prior preservation with class images (arXiv:2208.12242 eq. 2), drawn once by the frozen base.

    With `prompt: "{caption}"`, `count` images are drawn for the captions of the photos without the words of
    `data.trigger`, in turn. They keep prompts without a style as they were.

    `folder`: None stores the images in the cache, under a hash of all settings that determine them. A folder with the
    user's own images (without a manifest) is used unchanged. `caption_dropout` replaces some class captions by empty
    ones, so that the empty prompt does not learn the subject and guidance keeps the class unchanged.

    `share` is the number of class images in a step, relative to `run.batch_size`. Fewer make a step cheaper; `weight`
    is that of each, so that half as many need twice of it to pull as much.

    With `target: images` class images are trained as photos are. With `target: base` the trained model must keep the
    frozen base's prediction for them: as long as it does, their gradient is exactly 0, where that of images is noise.
    """

    predictions: ClassVar[int] = 2

    kind: Literal["class_images"] = "class_images"
    weight: float = Field(default=1.0, ge=0)
    count: int = Field(default=100, ge=1, le=100_000)
    prompt: str = "a photo of a {noun}"
    negative: str = ""
    folder: AnyPath | None = None
    sampler: Sampler = "dpm++"
    steps: int = Field(default=20, ge=1)
    guidance: float = 4.0
    batch_size: BatchSize = 8
    caption_dropout: float = Field(default=0.25, ge=0, le=1)
    target: ComparedWith = "images"
    flip: bool = True
    share: float = Field(default=1.0, gt=0, le=1)

    @property
    def prompts(self) -> list[str]:
        return [self.prompt]

    @property
    def class_images(self) -> ClassImages:
        return self

    @property
    def taught(self) -> tuple[Role, ...]:
        """The samples of a batch whose targets are the frozen base's predictions."""
        others = super().taught
        return ("class", *others) if self.target == "base" else others

    @property
    def passes(self) -> float:
        """The cost of a step for each photo, in training passes, without `others`."""
        return 1 + self.share * (1 + FORWARD * (self.target == "base"))

    def regularizers(self, attached: PriorContext) -> list[Regularizer]:
        """Empty: the class images are part of the batch, with their own weight."""
        return []
