"""UNets with extra inputs: a mask and a masked image (inpaint), a depth map (depth), or an image to edit (edit).

The extra inputs are channels after the noisy latents, with the same height and width:

- inpaint: the mask (1 where the model paints), and the latents of the image without that area (arXiv:2112.10752);
- depth: a depth map in [-1, 1] (Stable Diffusion 2 depth);
- edit: the unscaled latents of the image to edit (arXiv:2211.09800).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from finetune.families.drawing import ImageCondition, Wants

KINDS = ("inpaint", "depth", "edit")
GREY = 0.5
WANTS = {
    "": Wants(),
    "inpaint": Wants(("image", "mask"), ("strength",)),
    "depth": Wants(("depth",), ("image", "strength")),
    "edit": Wants(("image",), ("image_guidance",)),
}


def channels(kind: str, latent_channels: int = 4) -> int:
    """The number of extra channels after the noisy latents."""
    return {"": 0, "inpaint": 1 + latent_channels, "depth": 1, "edit": latent_channels}[kind]


def inputs_kind(config: dict[str, Any]) -> str | None:
    """The kind of extra inputs of a UNet with this config: "" for none, None if unknown."""
    latent = config.get("out_channels", 4)  # old configs omit both
    extra = config.get("in_channels", 4) - latent
    return next((kind for kind in ("", *KINDS) if channels(kind, latent) == extra), None)


@torch.no_grad()
def widen(unet: Any, extra: int) -> None:
    """Extends `conv_in` by `extra` input channels with zero weights, so that the output does not change at first
    (arXiv:2211.09800 section 3.2)."""
    old: nn.Conv2d = unet.conv_in
    assert old.bias is not None
    width = old.in_channels + extra
    new = nn.Conv2d(width, old.out_channels, 3, padding=1).to(old.weight.device, old.weight.dtype)
    new.weight.zero_()
    new.weight[:, : old.in_channels] = old.weight
    new.bias.copy_(old.bias)  # type: ignore[union-attr]
    unet.conv_in = new.requires_grad_(False).train(old.training)
    unet.register_to_config(in_channels=width)


def pipeline_inputs(kind: str, side: int, count: int, given: ImageCondition | None) -> dict[str, Any]:
    """The arguments for the pipeline of this kind."""
    given = given or nothing(kind, side)
    image = _repeated(given.image, side, count)
    if kind == "edit":
        return {"image": image, "image_guidance_scale": given.guidance}
    assert given.beside is not None
    if kind == "inpaint":
        beside = _repeated(given.beside, side, count)
        strength = 1.0 if given.strength is None else given.strength
        return {"image": image, "mask_image": beside, "strength": strength, "width": side, "height": side}
    depth = given.beside.repeat(count, 1, 1)  # of any size: the pipeline scales it to that of the latents
    if given.strength is not None:
        return {"image": image, "depth_map": depth, "strength": given.strength}
    # the depth pipeline starts from the image with most of the noise added: with grey, only the depth map matters
    return {"image": torch.full_like(image, GREY), "depth_map": depth, "strength": 1.0}


def nothing(kind: str, side: int) -> ImageCondition:
    """The default input image: grey and fully masked (inpaint), with a depth that falls from bottom to top (depth), or
    black (edit)."""
    image = torch.full((3, side, side), 0.0 if kind == "edit" else GREY)
    ramp = torch.linspace(0, 1, side).view(1, side, 1).expand(1, side, side)
    return ImageCondition(image, {"inpaint": torch.ones_like(ramp), "depth": ramp}.get(kind))


def _repeated(values: Tensor, side: int, count: int) -> Tensor:
    """[C, H, W] -> [count, C, side, side]."""
    sized = values[None] if values.shape[-2:] == (side, side) else interpolate(values[None], (side, side))
    return sized.repeat(count, 1, 1, 1)
