"""Prior preservation with class images (arXiv:2208.12242 eq. 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from finetune.core.settings import AnyPath
from finetune.sampling.settings import Sampler
from finetune.training.priors.base import PriorSettings

if TYPE_CHECKING:
    from finetune.training.regularizers import PriorContext, Regularizer


class ClassImages(PriorSettings):
    """Prior preservation with class images (arXiv:2208.12242 eq. 2), drawn once by the frozen base.

    `folder`: None keeps the set in the cache, named by what it was made of. A folder of the user's own pictures
    (without a manifest) is used as it is. `caption_dropout` empties class captions, so that the empty prompt does
    not learn the subject and guidance keeps the class as it was.
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
    batch_size: int = Field(default=8, ge=1)
    caption_dropout: float = Field(default=0.25, ge=0, le=1)
    flip: bool = True

    @property
    def prompts(self) -> list[str]:
        return [self.prompt]

    @property
    def class_images(self) -> ClassImages:
        return self

    def regularizers(self, attached: PriorContext) -> list[Regularizer]:
        """None: the class images are in the batch, with a weight of their own."""
        return []
