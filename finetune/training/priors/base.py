"""The interface of priors: ways to keep the base's knowledge of the class. A new prior is one new file in this folder.

Recipes are made of these classes, so modules here import torch only inside functions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from finetune.core.settings import Settings
from finetune.training.priors.others import Others

if TYPE_CHECKING:
    from finetune.core.batch import Role
    from finetune.families.base import Family
    from finetune.methods.base import Method
    from finetune.training.priors.class_images import ClassImages
    from finetune.training.regularizers import PriorContext, Regularizer, Teacher


CAPTION = "{caption}"  # in a class prompt: the photo's caption without the words of data.trigger


class PriorSettings(Settings, ABC):
    """The settings of a prior, in a recipe's `prior:` section. A new one is a file with a subclass and its `kind`.

    Class attributes:
        predictions: the number of predictions with a gradient in a training step for each photo.
        holds_reference: whether it keeps a copy of the initial trained weights (`Method.reference_bytes`).
        needs_distance: whether it needs `Method.distance`, which not every method supports.

    `others`: images of everything else, beside what the kind itself does; None for none.
    """

    predictions: ClassVar[int] = 1
    holds_reference: ClassVar[bool] = False
    needs_distance: ClassVar[bool] = False

    kind: str
    others: Others | None = None

    @property
    def of_captions(self) -> bool:
        """Whether the class prompt is made of each photo's caption without the trigger: `prompt` has {caption}."""
        return any(CAPTION in prompt for prompt in self.prompts)

    @property
    def prompts(self) -> list[str]:
        """Prompt templates that are encoded in addition to the captions; the first is the class prompt."""
        return []

    @property
    def class_images(self) -> ClassImages | None:
        """The settings of the class images in the training data; None if this prior uses none."""
        return None

    @abstractmethod
    def regularizers(self, attached: PriorContext) -> list[Regularizer]:
        """The penalties that are added to the loss of every micro-batch."""

    @property
    def passes(self) -> float:
        """The cost of a step for each photo, in training passes (forward and backward), without `others`."""
        return float(self.predictions)

    @property
    def taught(self) -> tuple[Role, ...]:
        """The samples of a batch whose targets are the frozen base's predictions."""
        return ("other",) if self.others is not None and self.others.target == "base" else ()

    @property
    def keeps_base(self) -> bool:
        """Whether the base is needed beside the trained model, or a copy of the weights at the start."""
        return self.holds_reference or bool(self.taught)

    def teacher(self, attached: PriorContext) -> Teacher | None:
        """Gives the targets of the samples in `taught`; None for none."""
        if not self.taught:
            return None
        from finetune.training.regularizers import BaseAsTeacher

        return BaseAsTeacher(attached, self.taught)

    def cost(self, method: Method, family: Family, class_prompt: str) -> str:
        """A line about the prior's cost for the plan; "" for none."""
        return ""


def held(what: str, size: int) -> str:
    """The end of a plan's line: `what` is kept in memory, with a size of `size` bytes."""
    return f", {what} ({size / 1e6:,.0f} MB)" if size else ", nothing is copied"
