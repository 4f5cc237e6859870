"""The `prior:` section of a recipe: how training keeps what the base knows about the class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from finetune.core.settings import AnyPath, Settings
from finetune.sampling.settings import Sampler

if TYPE_CHECKING:
    from finetune.families.base import Family
    from finetune.methods.base import Method
    from finetune.training.regularizers import PriorContext, Regularizer


class PriorSettings(Settings):
    """What every kind of `prior:` says of itself. The defaults are those of a kind without a penalty."""

    kind: str

    @property
    def prompts(self) -> list[str]:
        """Templates that are encoded beside the captions; the first is the class prompt."""
        return []

    def regularizers(self, attached: PriorContext) -> list[Regularizer]:
        return []

    def cost(self, method: Method, family: Family, class_prompt: str) -> str:
        """One line of the plan; empty for nothing to tell."""
        return ""


class FrozenBase(PriorSettings):
    """Prior preservation without class images: for the class prompt the trained model is held to what the base says.

    lambda w_t |pred(z_t, t, c_class) - stop_grad(pred_base(z_t, t, c_class))|^2 (2506.06483), at the subject's own
    noised latents. `caption_dropout` empties class prompts, so that the base's empty prompt, and guidance, stay too.
    """

    kind: Literal["frozen_base"] = "frozen_base"
    weight: float = Field(default=1.0, ge=0)
    prompt: str = "a photo of a {noun}"
    caption_dropout: float = Field(default=0.25, ge=0, le=1)

    @property
    def prompts(self) -> list[str]:
        return [self.prompt]

    def regularizers(self, attached: PriorContext) -> list[Regularizer]:
        from finetune.training.regularizers import KeepPrediction

        return [KeepPrediction(self, attached)]

    def cost(self, method: Method, family: Family, class_prompt: str) -> str:
        extra = _megabytes("a frozen copy of the trained parts", method.reference_bytes(family))
        return f"held to the base's prediction for {class_prompt!r}: a training and a forward pass more a step{extra}"


class Distance(PriorSettings):
    """lambda sum |theta - theta_0|^2 over the weights of the model (arXiv:2505.19519); for LoRA |s B A|_F^2 by layer.

    A sum and no mean: `weight` means the same whatever the number of weights that are trained.
    """

    kind: Literal["distance"] = "distance"
    weight: float = Field(default=1e-3, ge=0)

    def regularizers(self, attached: PriorContext) -> list[Regularizer]:
        distance = attached.method.distance(attached.family, attached.trained)
        return [lambda at: self.weight * distance()]

    def cost(self, method: Method, family: Family, class_prompt: str) -> str:
        extra = _megabytes("a copy of the weights at the start", method.reference_bytes(family))
        return f"the squared distance of the weights to the base{extra}"


def _megabytes(what: str, size: int) -> str:
    return f", {what} ({size / 1e6:,.0f} MB)" if size else ", nothing is copied"


class NoPrior(PriorSettings):
    """No prior preservation."""

    kind: Literal["none"] = "none"


class ClassImages(PriorSettings):
    """Prior preservation with class images (arXiv:2208.12242 eq. 2), drawn once by the frozen base.

    `folder`: None keeps the set in the cache, named by what it was made of. A folder of the user's own pictures
    (without a manifest) is used as it is. `caption_dropout` empties class captions, so that the empty prompt does
    not learn the subject and guidance keeps the class as it was.
    """

    kind: Literal["class_images"] = "class_images"
    weight: float = Field(default=1.0, ge=0)
    count: int = Field(default=100, ge=1)
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


Prior = Annotated[NoPrior | ClassImages | FrozenBase | Distance, Field(discriminator="kind")]
