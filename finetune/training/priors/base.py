"""The prior seam: how training keeps what the base knows about the class. A new prior is one new file in this folder.

A recipe is made of these classes, so modules here import torch inside functions only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from finetune.core.settings import Settings

if TYPE_CHECKING:
    from finetune.families.base import Family
    from finetune.methods.base import Method
    from finetune.training.priors.class_images import ClassImages
    from finetune.training.regularizers import PriorContext, Regularizer


class PriorSettings(Settings, ABC):
    """A recipe's `prior:` section is the constructor of one of these. A new one is a file with a subclass and its
    `kind`.

    Class attributes:
        predictions: how many predictions with a gradient a training step makes for each photo.
        holds_reference: keeps a copy of what is trained, as it was at the start (`Method.reference_bytes`).
        needs_distance: asks the method for `Method.distance`, which not every method measures.
    """

    predictions: ClassVar[int] = 1
    holds_reference: ClassVar[bool] = False
    needs_distance: ClassVar[bool] = False

    kind: str

    @property
    def prompts(self) -> list[str]:
        """Templates that are encoded beside the captions; the first is the class prompt."""
        return []

    @property
    def class_images(self) -> ClassImages | None:
        """The class images that are trained on beside the photos; None for none."""
        return None

    @abstractmethod
    def regularizers(self, attached: PriorContext) -> list[Regularizer]:
        """What is added to the loss of every micro-batch."""

    def cost(self, method: Method, family: Family, class_prompt: str) -> str:
        """One line of the plan; empty for nothing to tell."""
        return ""


def held(what: str, size: int) -> str:
    """The end of a plan's line: what is kept in memory, and its size in bytes."""
    return f", {what} ({size / 1e6:,.0f} MB)" if size else ", nothing is copied"
