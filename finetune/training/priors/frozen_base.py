"""Prior preservation by the frozen base's predictions (arXiv:2506.06483)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from finetune.training.priors.base import PriorSettings, held
from finetune.training.priors.others import FORWARD

if TYPE_CHECKING:
    from finetune.families.base import Family
    from finetune.methods.base import Method
    from finetune.training.regularizers import PriorContext, Regularizer


class FrozenBase(PriorSettings):
    """Prior preservation without class images: the trained model must keep the base's prediction for the class prompt.

    The penalty is lambda w_t |pred(z_t, t, c_class) - stop_grad(pred_base(z_t, t, c_class))|^2 (arXiv:2506.06483),
    with the subject's own noisy latents z_t. With `prompt: "{caption}"`, c_class is the photo's caption without the
    words of `data.trigger`. `caption_dropout` replaces some class prompts by empty ones, so that the prediction for
    the empty prompt, and with it guidance, stays too.
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

    @property
    def passes(self) -> float:
        return self.predictions + FORWARD

    def regularizers(self, attached: PriorContext) -> list[Regularizer]:
        from finetune.training.regularizers import KeepPrediction

        return [KeepPrediction(self, attached)]

    def cost(self, method: Method, family: Family, class_prompt: str) -> str:
        extra = held("a frozen copy of the trained parts", method.reference_bytes(family))
        prompt = "each caption without the trigger" if self.of_captions else repr(class_prompt)
        return f"keeps the base's prediction for {prompt}: one more training and forward pass a step{extra}"
