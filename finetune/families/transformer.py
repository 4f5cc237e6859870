"""Shared code of the families with a transformer (SD3, Flux): encoding with T5, and the modules that a LoRA adapts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from finetune.core.devices import sent
from finetune.core.errors import BadInput
from finetune.families.loading import DiffusersFamily

BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


class TransformerFamily(DiffusersFamily):
    @property
    def size_multiple(self) -> int:
        """A token is a patch of 2x2 latents."""
        return 2 * self.codec.factor

    @property
    def square_multiple(self) -> int:
        return self.size_multiple

    def _denoiser_targets(self, choice: str) -> list[str]:
        """The LoRA targets. `all-linear` omits the modulations (`norm*.linear`), as other trainers do."""
        if choice == "conv":
            raise BadInput(
                f"method.targets is 'conv' but {self.name} has no convolutions in its blocks: use all-linear"
            )
        linear = [
            path
            for path, child in self.parts["denoiser"].named_modules()
            if isinstance(child, nn.Linear) and path.startswith(BLOCKS)
        ]
        linear = [path for path in linear if not path.startswith(self.unused_parameters.get("denoiser", ("-",)))]
        if choice == "attention":
            return [path for path in linear if ".attn" in path and path.endswith(ATTENTION)]
        return [path for path in linear if ".norm" not in path]

    def _encode_t5(self, index: int, prompts: Sequence[str]) -> dict[str, Tensor]:
        """{"t5": [B, length, width]}, without an attention mask, as in the sampling pipelines."""
        encoder: Any = self.parts[self.text_encoders[index]]
        ids = sent(self.tokenize(index, prompts), encoder.device)
        return {"t5": encoder(ids)[0]}
