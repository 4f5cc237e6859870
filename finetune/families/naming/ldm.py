"""The original (LDM, SGM) names of a UNet's modules, computed from their diffusers names and the UNet's config.

The original code numbers all blocks in one sequence; diffusers nests them. Inside attention blocks the names agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune.families.naming.base import LYCORIS, Naming, Readers, Verdict

OTHER_SIDE = "it takes the norms over the other side of the matrix"
CHANGED = "it divides by the norm of the changed weight"
EXACT: Mapping[str, Mapping[str, Verdict]] = {  # LoHa, LoKr and DoRA in LyCORIS' format
    "loha": {"diffusers": ("refused", ""), LYCORIS: ("fully", "")},
    "lokr": {"diffusers": ("refused", ""), LYCORIS: ("refused", "fails where there is no alpha")},
    "dora": {
        "A1111": ("wrongly", OTHER_SIDE),
        "InvokeAI": ("wrongly", f"an error of 10 times the change, {OTHER_SIDE}"),
        "sdnext": ("wrongly", CHANGED),
        "diffusers": ("wrongly", "it drops dora_scale"),
        LYCORIS: ("wrongly", f"an error of 0.2 of the change, {CHANGED}"),
    },
}
NOT_DIFFUSERS = {"InvokeAI": ("refused", "it has no loader for these keys")}
SD_READERS = Readers(
    kohya=("ComfyUI", "Forge", "A1111", "InvokeAI", "sdnext", "diffusers"),
    embedding=("ComfyUI", "Forge", "A1111", "InvokeAI", "diffusers"),
    native=("ComfyUI", "Forge", "InvokeAI"),
    dora=("ComfyUI", "Forge"),
    others={**EXACT, "diffusers_format": NOT_DIFFUSERS, "with_texts": NOT_DIFFUSERS},
)
SDXL_DIFFUSERS: Mapping[str, Verdict] = {
    "ComfyUI": ("partly", "it matches only part of such keys (measured: 486 of 1,046, 88 at a wrong strength)"),
    "Forge": ("refused", "too many unmatched keys"),
    **NOT_DIFFUSERS,
}
SDXL_READERS = replace(
    SD_READERS,
    refuse_unknown=("InvokeAI",),
    others={**EXACT, "diffusers_format": SDXL_DIFFUSERS, "with_texts": SDXL_DIFFUSERS},
)


@dataclass(frozen=True)
class UNetNaming(Naming):
    """kohya's files have diffusers' names for SD1 and SD2, and the original names for SDXL. Other trainers also write
    the other way round.

    original: whether our files have the original names. With diffusers' names, A1111 loses a convolution of SDXL; a
    file with both styles is refused by InvokeAI.
    """

    original: bool = False

    def original_names(self, paths: Sequence[str], config: Mapping[str, Any]) -> dict[str, list[str]]:
        return {unet_name(path, dict(config)) if self.original else path: [path] for path in paths}

    def other_names(self, name: str, config: Mapping[str, Any]) -> list[str]:
        other = (diffusers_name if self.original else unet_name)(name, dict(config))
        return [f"{self.prefixes['denoiser']}_{other.replace('.', '_')}"]


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
UP_BLOCKS = ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3)  # diffusers' default, which configs may omit
MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
FROM_RESNET, FROM_OUTSIDE, FROM_MIDDLE = (
    {original: name for name, original in names.items()} for names in (RESNET, OUTSIDE, MIDDLE)
)


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
    layers = _layers(config)
    if head == "down_blocks":
        first = 1 + sum(count + 1 for count in layers[: int(block)])
        if kind == "downsamplers":
            return _join("input_blocks", str(first + layers[int(block)]), "0", "op")
        return _join("input_blocks", str(first + int(number)), "01"[kind == "attentions"], _inside(kind, inside))
    layers = layers[::-1]
    first = sum(count + 1 for count in layers[: int(block)])
    if kind == "upsamplers":
        attends = "CrossAttn" in config.get("up_block_types", UP_BLOCKS)[int(block)]
        return _join("output_blocks", str(first + layers[int(block)]), "12"[attends], *inside)
    return _join("output_blocks", str(first + int(number)), "01"[kind == "attentions"], _inside(kind, inside))


def diffusers_name(name: str, config: dict[str, Any]) -> str:
    """The inverse of `unet_name`: "input_blocks.4.1.proj_in" -> "down_blocks.1.attentions.0.proj_in".

    Raises:
        KeyError: the UNet has no such module.
    """
    if name in FROM_OUTSIDE:
        return FROM_OUTSIDE[name]
    head, number, *rest = name.split(".")
    if head == "middle_block":
        kind = FROM_MIDDLE[number]
        return _join("mid_block", kind, _back(kind, rest))
    slot, *inside = rest
    layers = _layers(config) if head == "input_blocks" else _layers(config)[::-1]
    block, layer = _place(int(number) - (head == "input_blocks"), layers)
    if head == "input_blocks" and layer == layers[block]:
        return f"down_blocks.{block}.downsamplers.0.conv"
    side = {"input_blocks": "down_blocks", "output_blocks": "up_blocks"}[head]
    attends = "CrossAttn" in config.get("up_block_types", UP_BLOCKS)[block] or side == "down_blocks"
    kind = "resnets" if slot == "0" else "attentions" if slot == "1" and attends else "upsamplers"
    return _join(f"{side}.{block}", f"{kind}.{0 if kind == 'upsamplers' else layer}", _back(kind, inside))


def _layers(config: dict[str, Any]) -> list[int]:
    """The number of layers of each down block; a config may have one number for all."""
    given = config.get("layers_per_block", 2)
    return (
        list(given)
        if isinstance(given, list | tuple)
        else [int(given)] * len(config.get("block_out_channels", UP_BLOCKS))
    )


def _place(number: int, layers: list[int]) -> tuple[int, int]:
    """(block, layer) of a numbered module; each block has one more than its layers."""
    for block, count in enumerate(layers):
        if number <= count:
            return block, number
        number -= count + 1
    raise KeyError(number)


def _back(kind: str, inside: list[str]) -> str:
    path = ".".join(inside)
    return FROM_RESNET[path] if kind.startswith("resnets") and path else path


def _inside(kind: str, inside: list[str]) -> str:
    path = inside[0] if inside else ""
    return RESNET[path] if kind == "resnets" and path else path


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def vae_name(path: str, config: dict[str, Any]) -> str:
    """A diffusers VAE module path -> its original path ("decoder.up.3.block.0.conv1")."""
    half, _, rest = path.partition(".")
    if half not in ("encoder", "decoder"):
        return path
    head, _, inside = rest.partition(".")
    if head in ("conv_in", "conv_out"):
        return path
    if head == "conv_norm_out":
        return f"{half}.norm_out"
    if head == "mid_block":
        kind, number, leaf = inside.split(".", 2)
        if kind == "attentions":
            return f"{half}.mid.attn_1.{VAE_ATTENTION[leaf]}"
        return f"{half}.mid.block_{int(number) + 1}.{_vae_leaf(leaf)}"
    block, kind, number, leaf = inside.split(".", 3)
    side, level = (
        ("down", int(block)) if half == "encoder" else ("up", len(config["block_out_channels"]) - 1 - int(block))
    )
    if kind == "resnets":
        return f"{half}.{side}.{level}.block.{number}.{_vae_leaf(leaf)}"
    return f"{half}.{side}.{level}.{side}sample.{leaf}"


def _vae_leaf(leaf: str) -> str:
    return "nin_shortcut" if leaf == "conv_shortcut" else leaf


OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
OPEN_CLIP_OUTSIDE = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}


def open_clip_name(key: str) -> tuple[str, int | None]:
    """A CLIP weight's name in transformers (without `text_model.`) -> its name in OpenCLIP, and its third of that
    tensor if OpenCLIP joins query, key and value (None: the whole tensor)."""
    if key in OPEN_CLIP_OUTSIDE:
        return OPEN_CLIP_OUTSIDE[key], None
    number, rest = key.removeprefix("encoder.layers.").split(".", 1)
    module, leaf = rest.rsplit(".", 1)
    block = f"transformer.resblocks.{number}"
    if module.startswith("self_attn.") and module[-6:] in ("q_proj", "k_proj", "v_proj"):
        return f"{block}.attn.in_proj_{leaf}", "qkv".index(module[-6])
    return f"{block}.{OPEN_CLIP[module]}.{leaf}", None
