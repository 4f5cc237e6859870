"""The original (LDM, SGM) names of a UNet's modules, made from its diffusers names and its config.

The original code numbers its blocks one after the other; diffusers nests them. Inside attention blocks both agree.
"""

from __future__ import annotations

from typing import Any

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}


def unet_name(path: str, config: dict[str, Any]) -> str:
    """A diffusers UNet module path -> its original path ("input_blocks.4.1.proj_in").

    Raises:
        KeyError: the UNet has no such module.
    """
    if path in OUTSIDE:
        return OUTSIDE[path]
    head, rest = path.split(".", 1)
    if head == "mid_block":
        kind, number, *inside = rest.split(".", 2)
        return _join("middle_block", MIDDLE[f"{kind}.{number}"], _inside(kind, inside))
    block, kind, number, *inside = rest.split(".", 3)
    layers = int(config.get("layers_per_block", 2))
    if head == "down_blocks":
        first = 1 + int(block) * (layers + 1)
        if kind == "downsamplers":
            return _join("input_blocks", str(first + layers), "0", "op")
        return _join("input_blocks", str(first + int(number)), "01"[kind == "attentions"], _inside(kind, inside))
    first = int(block) * (layers + 1)
    if kind == "upsamplers":
        attends = "CrossAttn" in config["up_block_types"][int(block)]
        return _join("output_blocks", str(first + layers), "12"[attends], *inside)
    return _join("output_blocks", str(first + int(number)), "01"[kind == "attentions"], _inside(kind, inside))


def _inside(kind: str, inside: list[str]) -> str:
    path = inside[0] if inside else ""
    return RESNET[path] if kind == "resnets" and path else path


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
