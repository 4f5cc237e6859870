"""Bases with random weights, created on the device: real sizes without a download and without disk space."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from finetune.families.base import Family
from finetune.families.parts import skeletons
from finetune.families.registry import family_of
from finetune.testing.tiny_transformers import tiny_t5_tokenizer
from finetune.testing.tiny_unets import tiny_tokenizer


def random_family(folder: Path, dtype: torch.dtype, device: torch.device | str, parts: Sequence[str]) -> Family:
    """A family for the configs in `folder` (written by `testing.published`) with random weights in `dtype`. Only
    `parts` are created; the others are released. Its tokenizers know only a few words."""
    family = family_of(folder).on_meta(folder, dtype)
    family.parts.device = torch.device(device)
    family.tokenizers = [_tokenizer(folder, name) for name in family.text_encoders]
    family.parts.release(list(family.parts))
    make_parts(family, dtype, parts)
    return family


def make_parts(family: Family, dtype: torch.dtype, parts: Sequence[str]) -> None:
    """Creates `parts` with random weights in `dtype` on the family's device, frozen."""
    for part in parts:
        with _default_dtype(dtype):
            module = skeletons(family.sources, family.folder, [part], family.device)[part]
        family.parts[part] = module.to(dtype).requires_grad_(False).eval()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Sets torch's default dtype, so that a base with 12 billion weights is not created in fp32 first."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _tokenizer(folder: Path, encoder: str) -> Any:
    """A small tokenizer with the real one's length, so that prompts have the real number of tokens."""
    is_t5 = json.loads((folder / encoder / "config.json").read_text(encoding="utf-8")).get("model_type") == "t5"
    target = folder / encoder.replace("text_encoder", "tokenizer")
    target.mkdir(exist_ok=True)
    tokenizer = tiny_t5_tokenizer(target) if is_t5 else tiny_tokenizer(target)
    cast(Any, tokenizer).model_max_length = 512 if is_t5 else 77
    return tokenizer
