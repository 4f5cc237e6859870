"""bitsandbytes' AdamW with 8-bit moments that can move to main memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from finetune.core.errors import BadInput
from finetune.optim.base import Adam, Window

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class PagedAdamW8bit(Adam):
    """`adamw8bit` with its moments in CUDA's managed memory: they move to main memory when the GPU's is full."""

    state_bytes: ClassVar[float] = 2.03
    whole: ClassVar[str] = ""
    packages: ClassVar[tuple[str, ...]] = ("bitsandbytes",)
    kind: Literal["paged_adamw8bit"] = "paged_adamw8bit"

    def check_device(self, device: str) -> None:
        if device != "cuda":
            raise BadInput(
                f"optim.kind is 'paged_adamw8bit', which needs an NVIDIA GPU, but this run is on {device}: "
                "use optim.kind=adamw8bit"
            )

    def build(self, trained: Mapping[str, nn.Parameter], windows: Mapping[str, Window] | None = None) -> Optimizer:
        for parameter in trained.values():
            self.check_device(parameter.device.type)
        return paged_class()(
            self.groups(trained, windows),
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
        )


def paged_class() -> Callable[..., Optimizer]:
    """bitsandbytes' class, changed so that a loaded state is paged too: its own load keeps the state on the GPU."""
    import bitsandbytes as bnb
    import torch

    class Paged(bnb.optim.PagedAdamW8bit):
        @torch.no_grad()
        def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
            load: Callable[..., None] = super().load_state_dict
            load(state_dict, move_to_device)
            buffer_for: Callable[..., torch.Tensor] = self.get_state_buffer
            for parameter, state in self.state.items():
                for key in {"state1", "state2"} & state.keys():
                    buffer = buffer_for(parameter, dtype=state[key].dtype)
                    state[key] = buffer.copy_(state[key])

    return Paged
