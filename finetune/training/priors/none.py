"""No prior preservation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from finetune.training.priors.base import PriorSettings

if TYPE_CHECKING:
    from finetune.training.regularizers import PriorContext, Regularizer


class NoPrior(PriorSettings):
    """No prior preservation."""

    kind: Literal["none"] = "none"

    def regularizers(self, attached: PriorContext) -> list[Regularizer]:
        return []
