"""Finds the family of a diffusers folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from finetune.core.errors import BadInput
from finetune.core.registry import Registry
from finetune.families.base import Family
from finetune.families.configs import read_config, well_formed
from finetune.families.naming.clip import strip_text_model

FAMILIES: Registry[Family] = Registry(Family, "finetune.families", lambda item: item.name)


def denoiser_folders() -> list[str]:
    """The folders of a diffusers base that may hold the denoiser: "unet", "transformer"."""
    return sorted({family.sources["denoiser"].folder for family in FAMILIES.values()}, reverse=True)


def family_of(folder: Path) -> type[Family]:
    """The family of a diffusers folder, recognised from its configs. If several match, the most derived one is used.

    Raises:
        BadInput: the folder is not a diffusers folder, or its family is not supported.
    """
    index = read_config(folder, "model_index.json")
    part = next((name for name in denoiser_folders() if (folder / name / "config.json").is_file()), None)
    if part is None:
        wanted = " or ".join(f"{name}/config.json" for name in denoiser_folders())
        raise BadInput(f"{folder} has no {wanted}: the base must be a complete diffusers folder")
    denoiser = read_config(folder, f"{part}/config.json")
    with well_formed(folder):
        matching = [family for family in FAMILIES.values() if family.matches(index, denoiser)]
    if matching:
        return _most_special(matching)
    raise BadInput(
        f"{folder} is a {index.get('_class_name')!r} with {denoiser.get('in_channels')} input channels; "
        f"supported are {', '.join(FAMILIES)}: choose a text-to-image base of those"
    )


def _most_special(matching: Sequence[type[Family]]) -> type[Family]:
    """A variation derives from the family that it varies, and narrows `matches`: it goes before that family."""
    return next(
        family
        for family in matching
        if not any(issubclass(other, family) for other in matching if other is not family)
    )


def weight_shapes(folder: Path) -> dict[str, dict[str, torch.Size]]:
    """part -> module path, without `text_model.` -> the shape of its weight, but for tables of embeddings, which no
    LoRA changes. Only configs are read."""
    return {
        part: {
            strip_text_model(path): child.weight.shape
            for path, child in skeleton.named_modules()
            if isinstance(getattr(child, "weight", None), torch.Tensor) and not isinstance(child, torch.nn.Embedding)
        }
        for part, skeleton in family_of(folder).skeletons(folder).items()
    }


def own_paths(folder: Path) -> dict[str, dict[str, str]]:
    """part -> module path without `text_model.` -> the module's real path, which PEFT uses."""
    return {
        part: {strip_text_model(path): path for path, _ in skeleton.named_modules()}
        for part, skeleton in family_of(folder).skeletons(folder).items()
    }


def denoiser_config(folder: Path) -> dict[str, Any]:
    """The denoiser's config of a diffusers folder."""
    return read_config(folder, f"{family_of(folder).sources['denoiser'].folder}/config.json")
