"""The files for loaders.py: for every family and kind of adapter, as our exports write them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.export.adapter import adapter_from
from finetune.export.base import Request, delta
from finetune.export.lora.diffusers import Diffusers
from finetune.export.lora.kohya import Kohya
from finetune.export.lora.lycoris import Lycoris
from finetune.export.lora.peft import Peft
from finetune.families.base import Family
from finetune.families.naming.clip import strip_text_model
from finetune.families.registry import family_of
from finetune.methods.peft_adapter import PeftAdapter
from finetune.methods.registry import METHODS
from finetune.testing.published import write
from finetune.testing.random_base import random_family

Place = tuple[str, str]  # part, module path without `text_model.`
Deltas = dict[Place, Tensor]

CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "projection_dim": 32}
WIDTHS = {"cross_attention_dim": 32, "attention_head_dim": 8, "norm_num_groups": 8}
MMDIT = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 64}
BASES: dict[str, dict[str, Any]] = {  # published model -> the widths that replace its own, by part
    "SD 1.5": {"unet": WIDTHS | {"block_out_channels": [32, 64, 64, 64]}},
    "SD 2.1": {"unet": WIDTHS | {"block_out_channels": [32, 64, 64, 64]}},
    "SDXL": {
        "unet": WIDTHS
        | {
            "block_out_channels": [32, 64, 64],
            "cross_attention_dim": 64,
            "projection_class_embeddings_input_dim": 1568,
        }
    },
    "SD3.5 medium": {"transformer": MMDIT | {"caption_projection_dim": 32, "pooled_projection_dim": 64}},
    "Flux.1 dev": {"transformer": MMDIT | {"pooled_projection_dim": 32, "axes_dims_rope": [4, 6, 6]}},
}
KINDS = ["lora", "lora with conv", "lora with text encoders", "loha", "lokr", "dora"]


@dataclass(frozen=True)
class Base:
    """A published model in small widths, with random weights."""

    model: str
    folder: Path

    @staticmethod
    def written(model: str, folder: Path) -> Base:
        write(model, folder)
        texts = ["text_encoder", "text_encoder_2", "text_encoder_3"]
        for part, widths in (dict.fromkeys(texts, CLIP) | BASES[model]).items():
            file = folder / part / "config.json"
            if file.is_file():
                held = json.loads(file.read_text(encoding="utf-8"))
                text = json.dumps(held | ({"d_model": 64} if "d_model" in held else widths))
                file.write_text(text, encoding="utf-8", newline="\n")
        return Base(model, folder)

    @cached_property
    def _clean(self) -> Family:
        texts = family_of(self.folder).on_meta(self.folder, torch.float32).trainable_text_encoders
        torch.manual_seed(0)
        return random_family(self.folder, torch.float32, "cpu", ["denoiser", *texts])

    def family(self) -> Family:
        """A copy with the base's weights."""
        return copy.deepcopy(self._clean)


@dataclass(frozen=True)
class Case:
    """One file: `form` is the name of its export format, `ours` what our own reader finds in it."""

    base: Base
    kind: str
    form: str
    path: Path
    ours: Deltas


def cases(base: Base, folder: Path) -> Iterator[Case]:
    for kind in KINDS:
        family = base.family()
        joined = family.naming.joined
        if kind.endswith("conv") and joined:
            continue
        texts = kind.endswith("encoders") or (kind in ("loha", "lokr", "dora") and not joined)
        targets = "conv" if not joined and kind != "lora" else "all-linear"
        parts = ["denoiser", *["text_encoders"] * texts]
        settings: dict[str, Any] = {"rank": 4, "alpha": 2.0, "targets": targets, "parts": parts}
        method = METHODS[kind.split()[0]](**settings)
        assert isinstance(method, PeftAdapter)
        made = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for value in method.attach(family, 0).values():
                value.add_(torch.randn(value.shape, generator=made) * 0.05)
            yield from _written(Case(base, kind, "", folder, {}), method, family)


def _written(case: Case, method: PeftAdapter, family: Family) -> Iterator[Case]:
    base, name = case.base, f"{case.base.model}-{case.kind}".replace(" ", "-")
    if not method.low_rank:
        path = Lycoris().path(case.path, name, family.name)
        about = {"title": name, "trigger_phrase": "", "resolution": "512x512"}
        Lycoris().write(method, family, path, Request(case.path, name, "fp32", about))
        clean = base.family()
        modules, held = modules_of(clean), Lycoris().read(path, clean)
        ours = {place: Lycoris().change(tensors, modules[place].weight) for place, tensors in held.items()}
        yield Case(base, case.kind, "lycoris", path, ours)
        return
    adapter = adapter_from(method, family)
    for export in (Kohya(), Diffusers(), Peft()):
        path = export.path(case.path, name, family.name)
        export.write(adapter, path, torch.float32, {})
        again = export.read(path, family.name, base.folder)
        ours = {(part, module): delta(a, b, again.scale) for part, module, a, b in again.modules()}
        yield Case(base, case.kind, export.name, path, ours)


def modules_of(family: Family) -> dict[Place, Any]:
    """Every module of the parts that an adapter can change."""
    return {
        (part, strip_text_model(path)): child
        for part in family.naming.prefixes
        for path, child in family.parts[part].named_modules()
    }
