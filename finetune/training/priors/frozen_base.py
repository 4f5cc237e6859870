"""Prior preservation by the frozen base's predictions (2506.06483)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from finetune.training.priors.base import PriorSettings, held

if TYPE_CHECKING:
    from finetune.families.base import Family
    from finetune.methods.base import Method
    from finetune.training.regularizers import PriorContext, Regularizer


class FrozenBase(PriorSettings):
    """Prior preservation without class images: for the class prompt the trained model is held to what the base says.

    lambda w_t |pred(z_t, t, c_class) - stop_grad(pred_base(z_t, t, c_class))|^2 (2506.06483), at the subject's own
    noised latents. `caption_dropout` empties class prompts, so that the base's empty prompt, and guidance, stay too.
    """

    predictions: ClassVar[int] = 2
    holds_reference: ClassVar[bool] = True

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
        extra = held("a frozen copy of the trained parts", method.reference_bytes(family))
        return f"held to the base's prediction for {class_prompt!r}: a training and a forward pass more a step{extra}"
