"""LoKr through PEFT (LyCORIS, arXiv:2309.14859): W + (alpha / r) kron(C, B A)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from finetune.methods.loha import never_dropped
from finetune.methods.peft_adapter import Ranked, tensors_of

if TYPE_CHECKING:
    from torch import Tensor


class LoKr(Ranked):
    """The Kronecker product of a small matrix and a low-rank one. The latter is a full matrix if r is at least half of
    its side.

    `factor`: approximate side of the small matrix; `null` splits each side near its square root.
    """

    artifacts: ClassVar = ("adapter", "native")
    marks: ClassVar = (".lokr_",)
    kind: Literal["lokr"] = "lokr"
    rank: int = Field(default=16, ge=1, le=1_000_000)  # LyCORIS says 100,000 for a full matrix
    factor: int | None = Field(default=None, ge=2)

    def config(self, targets: list[str]) -> Any:
        import peft

        return peft.LoKrConfig(
            r=self.rank, alpha=self.peft_alpha, decompose_factor=self.factor or -1, target_modules=targets
        )

    def native_tensors(self, layer: Any) -> dict[str, Tensor]:
        """Readers ignore alpha where both matrices are whole, so the scale is multiplied into the second one there."""
        import torch

        held = tensors_of(layer)
        if "lokr_w2" in held:
            return held | {"lokr_w2": held["lokr_w2"] * self.scale}
        return held | {"alpha": torch.tensor(self.alpha_value)}

    def prepare(self, layer: Any) -> None:
        never_dropped(layer)
