"""Shared code of the families with a UNet: the modules that a LoRA adapts, its native size, and its extra inputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from finetune.core.errors import BadInput
from finetune.families.conditioning import WANTS, channels, inputs_kind, pipeline_inputs, widen
from finetune.families.configs import read_config
from finetune.families.drawing import DiffusersDrawing, ImageCondition, Wants
from finetune.families.loading import DiffusersFamily

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


class UNetDrawing(DiffusersDrawing):
    """Chooses the pipeline for the UNet's extra inputs."""

    def pipeline_name(self) -> str:
        assert isinstance(self.family, UNetFamily)
        return self.family.pipelines[self.family.inputs or ""]

    @property
    def wants(self) -> Wants:
        return WANTS[self.family.inputs or ""]

    def inputs(self, side: int, count: int, steps: int, given: ImageCondition | None) -> dict[str, Any]:
        if self.family.inputs is None:
            return super().inputs(side, count, steps, given)
        return pipeline_inputs(self.family.inputs, side, count, given)


class UNetFamily(DiffusersFamily):
    # extra inputs ("" for none) -> the `_class_name` of such a base
    pipelines: ClassVar[dict[str, str]]
    drawing_class = UNetDrawing

    def __init__(self, folder: Path, dtype: torch.dtype, without: Sequence[str] = (), on_meta: bool = False) -> None:
        super().__init__(folder, dtype, without, on_meta)
        self.inputs = inputs_kind(dict(cast(Any, self.parts["denoiser"]).config)) or None

    @classmethod
    def matches(cls, model_index: dict[str, Any], denoiser_config: dict[str, Any]) -> bool:
        pipeline = model_index.get("_class_name")
        if pipeline not in cls.pipelines.values():  # another's configs need not have a UNet's numbers of channels
            return False
        kind = inputs_kind(denoiser_config)
        return kind is not None and pipeline == cls.pipelines.get(kind)

    def widen(self, inputs: str) -> None:
        if self.inputs not in (None, inputs):
            raise BadInput(f"base.inputs is {inputs!r} but the base reads {self.inputs!r}: leave base.inputs out")
        if inputs not in self.pipelines:
            raise BadInput(f"base.inputs is {inputs!r}, which diffusers can't draw with {self.name}: use another base")
        if inputs == "inpaint" and self.codec.channels != 4:
            raise BadInput(
                f"base.inputs is 'inpaint' but the base has {self.codec.channels} latent channels, and diffusers' "
                "inpainting needs 4: use another base"
            )
        if self.inputs is None:
            self.inputs, self.widened = inputs, True
            widen(self.parts["denoiser"], channels(inputs, self.codec.channels))

    def _load_part(self, name: str) -> nn.Module:
        part = super()._load_part(name)
        if name == "denoiser" and self.widened and self.inputs:
            widen(part, channels(self.inputs, self.codec.channels))
        return part

    def _read(self, noisy: Tensor) -> Tensor:
        """The UNet's input in the dtype of its weights. Missing extra inputs are filled with zeros."""
        denoiser: Any = self.parts["denoiser"]
        weight = denoiser.conv_in.weight  # diffusers' own `.dtype` walks all modules: 3 % of a small step
        missing = weight.shape[1] - noisy.shape[1]
        return pad(noisy.to(weight.dtype), (0, 0, 0, 0, 0, missing)) if missing else noisy.to(weight.dtype)

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
        """A UNet halves the latents between blocks, so this is 64 pixels for SD1 and SD2, and 32 for SDXL."""
        blocks = cast(Any, self.parts["denoiser"]).config.block_out_channels
        multiple: int = self.codec.factor * 2 ** (len(blocks) - 1)
        return multiple

    @classmethod
    def resolution_of(cls, folder: Path) -> int:
        levels = len(read_config(folder, "vae/config.json").get("block_out_channels", (0,)))
        pixels: int = int(read_config(folder, "unet/config.json").get("sample_size", 64)) * 2 ** (levels - 1)
        return pixels
