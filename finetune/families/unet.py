"""What the families with a UNet share: which of its modules a LoRA adapts, and its native size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from torch import nn

from finetune.families.loading import DiffusersFamily

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


class UNetFamily(DiffusersFamily):
    def _denoiser_targets(self, choice: str) -> list[str]:
        module = self.parts["denoiser"]
        if choice == "attention":
            linear = [path for path, child in module.named_modules() if isinstance(child, nn.Linear)]
            return [path for path in linear if path.endswith(ATTENTION)]
        both = [path for path, child in module.named_modules() if isinstance(child, nn.Linear | nn.Conv2d)]
        inside = [path for path in both if ".attentions." in path or path.startswith("attentions.")]
        if choice == "all-linear":
            return inside
        return [*inside, *[path for path in both if ".resnets." in path or "samplers." in path]]

    @property
    def size_multiple(self) -> int:
        """A UNet halves the latents once between two blocks: 64 pixels for SD1 and SD2, 32 for SDXL."""
        blocks = cast(Any, self.parts["denoiser"]).config.block_out_channels
        return self.latent_factor * 2 ** (len(blocks) - 1)

    @classmethod
    def resolution_of(cls, folder: Path) -> int:
        def read(part: str) -> dict:
            return json.loads((folder / part / "config.json").read_text(encoding="utf-8"))

        levels = len(read("vae").get("block_out_channels", (0,)))
        return int(read("unet").get("sample_size", 64)) * 2 ** (levels - 1)
