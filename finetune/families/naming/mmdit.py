"""The original names of SD3's and Flux's modules, from their diffusers names.

The original code joins q, k and v (and in Flux's single blocks the MLP) into one matrix; diffusers has separate
modules. So each name has a slot: the position of the module among the rows of the joined matrix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.families.naming.base import Naming, Readers, Verdict

NO_FLUX: Verdict = ("nothing", "it has no Flux")
CONVERTER: Verdict = ("unknown", "its converter gives the same weights, tested at full size")
UNMATCHED: Verdict = ("nothing", "no key matches")
EXACT_FLUX: Mapping[str, Verdict] = {  # LoHa, LoKr and DoRA in LyCORIS' format
    "A1111": NO_FLUX,
    "InvokeAI": ("refused", "it has no loader for such a file"),
    "diffusers": ("refused", ""),
}
EXACT_SD3: Mapping[str, Verdict] = {
    "InvokeAI": ("refused", "it has no LoRA loader for SD3"),
    "diffusers": ("refused", ""),
}
FLUX_READERS = Readers(
    kohya=("ComfyUI", "Forge", "InvokeAI", "sdnext"),
    kohya_with_texts=("ComfyUI", "Forge", "InvokeAI"),
    diffusers_format=("ComfyUI", "Forge", "InvokeAI", "diffusers"),
    with_texts=("ComfyUI", "Forge", "diffusers"),
    embedding=("diffusers",),
    native=("ComfyUI",),  # read from its source: it maps `lycoris_` names to the rows of its joined matrices
    dora=("ComfyUI",),
    others={
        "native": EXACT_FLUX,
        "dora": EXACT_FLUX,
        "kohya": {"A1111": NO_FLUX, "diffusers": CONVERTER},
        "kohya_with_texts": {
            "A1111": NO_FLUX,
            "diffusers": CONVERTER,
            "sdnext": ("refused", "drops the whole file"),
        },
        "diffusers_format": {"A1111": NO_FLUX, "sdnext": UNMATCHED},
        "with_texts": {"A1111": NO_FLUX, "InvokeAI": ("refused", "raises when it draws"), "sdnext": UNMATCHED},
        "embedding": {"ComfyUI": ("partly", "hands T5 a tensor of the wrong width")},
    },
)
SD3_READERS = Readers(
    kohya=("ComfyUI", "Forge"),
    diffusers_format=("ComfyUI", "diffusers"),
    with_texts=("diffusers",),
    native=("ComfyUI",),
    dora=("ComfyUI",),
    others={
        "native": EXACT_SD3,
        "dora": EXACT_SD3,
        "kohya": {
            "A1111": ("refused", "fails at .alpha"),
            "InvokeAI": ("refused", "does not recognise it"),
            "sdnext": ("nothing", "does not know attn2"),
            "diffusers": ("refused", ""),
        },
        "diffusers_format": {
            "Forge": ("refused", "672 unmatched keys"),
            "A1111": ("partly", "only q, k, v and out of the image half"),
            "InvokeAI": ("refused", "takes it for a Qwen-Image LoRA"),
            "sdnext": UNMATCHED,
        },
        "embedding": {
            "ComfyUI": ("partly", "hands T5 a tensor of the wrong width"),
            "diffusers": ("refused", "its pipeline has no reader"),
        },
    },
)

# inside a block: diffusers -> (original, slot)
FLUX_DOUBLE = {
    "attn.to_q": ("img_attn.qkv", 0),
    "attn.to_k": ("img_attn.qkv", 1),
    "attn.to_v": ("img_attn.qkv", 2),
    "attn.to_out.0": ("img_attn.proj", 0),
    "attn.add_q_proj": ("txt_attn.qkv", 0),
    "attn.add_k_proj": ("txt_attn.qkv", 1),
    "attn.add_v_proj": ("txt_attn.qkv", 2),
    "attn.to_add_out": ("txt_attn.proj", 0),
    "ff.net.0.proj": ("img_mlp.0", 0),
    "ff.net.2": ("img_mlp.2", 0),
    "ff_context.net.0.proj": ("txt_mlp.0", 0),
    "ff_context.net.2": ("txt_mlp.2", 0),
    "norm1.linear": ("img_mod.lin", 0),
    "norm1_context.linear": ("txt_mod.lin", 0),
}
FLUX_SINGLE = {
    "attn.to_q": ("linear1", 0),
    "attn.to_k": ("linear1", 1),
    "attn.to_v": ("linear1", 2),
    "proj_mlp": ("linear1", 3),
    "proj_out": ("linear2", 0),
    "norm.linear": ("modulation.lin", 0),
}
FLUX_OUTSIDE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "proj_out": "final_layer.linear",
}
SD3_BLOCK = {
    "attn.to_q": ("x_block.attn.qkv", 0),
    "attn.to_k": ("x_block.attn.qkv", 1),
    "attn.to_v": ("x_block.attn.qkv", 2),
    "attn.to_out.0": ("x_block.attn.proj", 0),
    "attn2.to_q": ("x_block.attn2.qkv", 0),
    "attn2.to_k": ("x_block.attn2.qkv", 1),
    "attn2.to_v": ("x_block.attn2.qkv", 2),
    "attn2.to_out.0": ("x_block.attn2.proj", 0),
    "attn.add_q_proj": ("context_block.attn.qkv", 0),
    "attn.add_k_proj": ("context_block.attn.qkv", 1),
    "attn.add_v_proj": ("context_block.attn.qkv", 2),
    "attn.to_add_out": ("context_block.attn.proj", 0),
    "ff.net.0.proj": ("x_block.mlp.fc1", 0),
    "ff.net.2": ("x_block.mlp.fc2", 0),
    "ff_context.net.0.proj": ("context_block.mlp.fc1", 0),
    "ff_context.net.2": ("context_block.mlp.fc2", 0),
    "norm1.linear": ("x_block.adaLN_modulation.1", 0),
    "norm1_context.linear": ("context_block.adaLN_modulation.1", 0),
}
SD3_OUTSIDE = {
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "proj_out": "final_layer.linear",
}


@dataclass(frozen=True)
class Names:
    """The names of a transformer's modules in the original code.

    `blocks`: diffusers' list of blocks -> (the original list, the names inside a block with their slots). `outside`:
    all other modules. `swapped_in_last`: a module of the last block that differs from every original matrix.
    """

    blocks: Mapping[str, tuple[str, Mapping[str, tuple[str, int]]]] = field(default_factory=dict)
    outside: Mapping[str, str] = field(default_factory=dict)
    swapped_in_last: str = ""

    def original(self, path: str, last_block: int) -> tuple[str, int] | None:
        """A module path -> (original path, slot); None if no original matrix is equal to the module.

        That applies to the output's modulation, and in SD3 to the text modulation of the last block: diffusers swaps
        their halves.
        """
        found = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", path)
        if found is None or found[1] not in self.blocks:
            return (self.outside[path], 0) if path in self.outside else None
        if found[3] == self.swapped_in_last and int(found[2]) == last_block:
            return None
        name, inside = self.blocks[found[1]]
        if found[3] not in inside:
            return None
        original, slot = inside[found[3]]
        return f"{name}.{found[2]}.{original}", slot


FLUX_NAMES = Names(
    {
        "transformer_blocks": ("double_blocks", FLUX_DOUBLE),
        "single_transformer_blocks": ("single_blocks", FLUX_SINGLE),
    },
    FLUX_OUTSIDE,
)
SD3_NAMES = Names({"transformer_blocks": ("joint_blocks", SD3_BLOCK)}, SD3_OUTSIDE, "norm1_context.linear")


@dataclass(frozen=True)
class JoinedNaming(Naming):
    """kohya's file has the original matrices, some of which join several modules. More UIs read it than read
    diffusers' names."""

    joined: bool = True
    scale_in_matrices: bool = True
    names: Names = Names()

    def original_names(self, paths: Sequence[str], config: Mapping[str, Any]) -> dict[str, list[str]]:
        last = int(config["num_layers"]) - 1
        slots: dict[str, dict[int, str]] = {}
        for path in paths:
            found = self.names.original(path, last)
            if found is not None:
                slots.setdefault(found[0], {})[found[1]] = path
        return {name: [held[slot] for slot in sorted(held)] for name, held in slots.items()}

    def other_names(self, name: str, config: Mapping[str, Any]) -> list[str]:
        return [f"diffusion_model.{name}"]
