"""UNets that read more than noisy latents: what is painted over (inpaint), a depth map (depth), a picture (edit).

The extra inputs are channels behind the noisy latents, of the latents' size:

- inpaint: the mask (1 where it is painted), and the latents of the picture without what is painted (arXiv:2112.10752);
- depth: a depth map in [-1, 1] (Stable Diffusion 2 depth);
- edit: the latents of the picture that is edited, not scaled (arXiv:2211.09800).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from finetune.families.drawing import ImageCondition

KINDS = ("inpaint", "depth", "edit")
GREY = 0.5


def channels(kind: str, latent_channels: int = 4) -> int:
    """How many channels stand behind the noisy latents."""
    return {"": 0, "inpaint": 1 + latent_channels, "depth": 1, "edit": latent_channels}[kind]


def kind_of(config: dict[str, Any]) -> str | None:
    """What a UNet of this config reads beside its latents: "" for nothing, None for what is not known."""
    latent = config.get("out_channels", 4)  # old configs omit both
    extra = config.get("in_channels", 4) - latent
    return next((kind for kind in ("", *KINDS) if channels(kind, latent) == extra), None)


@torch.no_grad()
def widen(unet: Any, extra: int) -> None:
    """Lets `conv_in` read `extra` more channels through weights of zero, so that nothing changes at first
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
    """What the pipeline of this kind is called with."""
    given = given or nothing(kind, side)
    image = _repeated(given.image, side, count)
    if kind == "edit":
        return {"image": image, "image_guidance_scale": given.guidance}
    assert given.beside is not None
    beside = _repeated(given.beside, side, count)
    if kind == "inpaint":
        return {"image": image, "mask_image": beside, "strength": 1.0, "width": side, "height": side}
    # the depth pipeline starts from the picture under most of the noise: from grey, the depth map alone decides
    return {"image": torch.full_like(image, GREY), "depth_map": beside[:, 0], "strength": 1.0}


def nothing(kind: str, side: int) -> ImageCondition:
    """What is drawn from where nothing is given: grey that is painted over whole, depth that falls from the bottom of
    the picture to its top, or black that is edited."""
    image = torch.full((3, side, side), 0.0 if kind == "edit" else GREY)
    ramp = torch.linspace(0, 1, side).view(1, side, 1).expand(1, side, side)
    return ImageCondition(image, {"inpaint": torch.ones_like(ramp), "depth": ramp}.get(kind))


def _repeated(values: Tensor, side: int, count: int) -> Tensor:
    """[C, H, W] -> [count, C, side, side]."""
    sized = values[None] if values.shape[-2:] == (side, side) else interpolate(values[None], (side, side))
    return sized.repeat(count, 1, 1, 1)
