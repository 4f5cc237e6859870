"""The keys of LoRA files of any trainer: which module a tensor belongs to, and its role there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from finetune.export.lora.kohya import ALPHA
from finetune.families.naming.clip import strip_text_model

# the ending of a tensor's name -> its role: "a" is the down matrix, "b" the up matrix
OLD_ENDINGS = {  # of diffusers' own training scripts before PEFT
    ".lora_linear_layer.down.weight": "a", ".lora_linear_layer.up.weight": "b",
    ".lora.down.weight": "a", ".lora.up.weight": "b",
}  # fmt: skip
ENDINGS = OLD_ENDINGS | {
    ".lora_down.weight": "a", ".lora_up.weight": "b", ".lora_A.weight": "a", ".lora_B.weight": "b", ALPHA: "alpha",
}  # fmt: skip
OTHERS = {
    ".dora_scale": "DoRA", ".lora_magnitude_vector": "DoRA", ".hada_w1_a": "LoHa", ".hada_w1_b": "LoHa",
    ".hada_w2_a": "LoHa", ".hada_w2_b": "LoHa", ".lokr_w1": "LoKr", ".lokr_w2": "LoKr", ".lokr_w1_a": "LoKr",
    ".lokr_w1_b": "LoKr", ".lokr_w2_a": "LoKr", ".lokr_w2_b": "LoKr", ".oft_blocks": "OFT", ".oft_diag": "OFT",
    ".lora_mid.weight": "LoCon with a middle matrix", ".diff": "full differences", ".diff_b": "full differences",
}  # fmt: skip
# the oldest scripts name the attention's processor: X.attn1.processor.to_q_lora.down.weight
PROCESSOR = re.compile(r"(.+?)(?:\.processor)?\.to_(q|k|v|out)_lora\.(down|up)\.weight")
OLD_DIFFUSERS = "old diffusers"
BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")  # a UNet's names, which old files have without "unet."


@dataclass
class Modules:
    """The tensors of a file by module.

    `held`: module name -> its tensors by role ("a", "b", "alpha"); only modules with at least one matrix. `others`:
    keys of other methods -> the method's name. `odd`: keys that no trainer of LoRA writes, and those that repeat.
    `old`: whether some keys are those of diffusers' scripts before PEFT.
    """

    held: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    odd: list[str] = field(default_factory=list)
    old: bool = False

    @property
    def kind(self) -> str:
        """ "kohya", "diffusers", "old diffusers" or "a mixture of two formats"."""
        dotted = sum("." in name for name in self.held)
        if dotted and dotted < len(self.held):
            return "a mixture of two formats"
        return OLD_DIFFUSERS if self.old else "diffusers" if dotted else "kohya"


def is_lora(keys: list[str]) -> bool:
    """Whether any key belongs to a LoRA or a related adapter."""
    return any(key.endswith((*ENDINGS, *OTHERS)) or PROCESSOR.fullmatch(key) for key in keys)


def by_module(tensors: Mapping[str, Tensor]) -> Modules:
    """Sorts the tensors of a file by module."""
    found = Modules()
    held: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        other = next((ending for ending in OTHERS if key.endswith(ending)), None)
        place = None if other else _place(key)
        if other:
            found.others[key] = OTHERS[other]
        elif place is None or place[1] in held.get(place[0], {}):
            found.odd.append(key)
        else:
            held.setdefault(place[0], {})[place[1]] = value
            found.old |= key.endswith(tuple(OLD_ENDINGS)) or PROCESSOR.fullmatch(key) is not None
    found.held = {name: roles for name, roles in held.items() if roles.keys() & {"a", "b"}}
    theirs = {key.removesuffix(ending) for key in found.others for ending in OTHERS if key.endswith(ending)}
    found.odd += [f"{name}{ALPHA}" for name in held if name not in found.held and name not in theirs]
    return found


def without_wrapper(name: str) -> str:
    """A diffusers name without the wrapper that some encoders have."""
    prefix, dot, rest = name.partition(".")
    return f"{prefix}.{strip_text_model(rest)}" if dot else name


def _place(key: str) -> tuple[str, str] | None:
    """(module name, role) of a key; None if it has neither."""
    old = PROCESSOR.fullmatch(key)
    if old is not None:
        head, matrix, side = old.groups()
        texts = head.startswith("text_encoder")
        inside = f"{matrix}_proj" if texts else "to_out.0" if matrix == "out" else f"to_{matrix}"
        return _with_part(f"{head}.{inside}"), "a" if side == "down" else "b"
    ending = next((ending for ending in ENDINGS if key.endswith(ending)), None)
    return None if ending is None else (_with_part(key.removesuffix(ending)), ENDINGS[ending])


def _with_part(name: str) -> str:
    return f"unet.{name}" if name.startswith(BLOCKS) else name
