"""Prior preservation by the distance of the weights to the base (arXiv:2505.19519)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from finetune.training.priors.base import PriorSettings, held

if TYPE_CHECKING:
    from finetune.families.base import Family
    from finetune.methods.base import Method
    from finetune.training.regularizers import PriorContext, Regularizer


class Distance(PriorSettings):
    """lambda sum |theta - theta_0|^2 over the weights of the model (arXiv:2505.19519); for LoRA |s B A|_F^2 by layer.

    It is a sum, not a mean, so the meaning of `weight` does not depend on the number of trained weights.
    """

    holds_reference: ClassVar[bool] = True
    needs_distance: ClassVar[bool] = True

    kind: Literal["distance"] = "distance"
    weight: float = Field(default=1e-3, ge=0)

    def regularizers(self, attached: PriorContext) -> list[Regularizer]:
        distance = attached.method.distance(attached.family, attached.trained)
        return [lambda at: self.weight * distance()]

    def cost(self, method: Method, family: Family, class_prompt: str) -> str:
        extra = held("a copy of the weights at the start", method.reference_bytes(family))
        return f"the squared distance of the weights to the base{extra}"
