"""Describes a base from its configs alone, without reading its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from finetune.families.configs import read_config, well_formed
from finetune.families.parts import skeletons
from finetune.families.registry import family_of
from finetune.objectives.schedule import FlowSchedule, read_schedule


def facts(folder: Path) -> dict[str, str]:
    """Family, objective, schedule, resolution, encoders, sizes and weights of a diffusers folder, as text.

    Raises:
        BadInput: the folder is not a diffusers folder, or its family is not supported.
    """
    with well_formed(folder):
        return _facts(folder)


def _facts(folder: Path) -> dict[str, str]:
    family = family_of(folder)
    parts = skeletons(family.sources, folder, list(family.sources))
    scheduler = read_config(folder, "scheduler/scheduler_config.json")
    return {
        "family": f"{family.name} ({read_config(folder, 'model_index.json')['_class_name']})",
        "predicts": read_schedule(scheduler).prediction,
        "schedule": _schedule(scheduler),
        "resolution": f"{family.resolution_of(folder)} pixels",
        **{part: _encoder(folder, part) for part in parts if part.startswith("text_encoder")},
        "parameters": ", ".join(f"{part} {_millions(module)}" for part, module in parts.items()),
        "weights": _weights(folder),
        "can train": f"adapters or whole weights: {', '.join(family.trainable_parts())}; new words: "
        f"{', '.join(part for part in family.trainable_parts() if part != 'denoiser')}",
    }


def _schedule(config: dict[str, Any]) -> str:
    schedule = read_schedule(config)
    if isinstance(schedule, FlowSchedule):
        shift = "by the number of tokens" if schedule.dynamic else f"{schedule.shift:g}"
        return f"rectified flow, {schedule.steps} timesteps, shift {shift}"
    last = float(schedule.alphas_cumprod[-1])
    return (
        f"{config.get('beta_schedule', 'linear')} {config.get('beta_start', 1e-4):g} to "
        f"{config.get('beta_end', 0.02):g}, {schedule.steps} timesteps, terminal SNR {last / (1 - last):.2g}"
    )


def _encoder(folder: Path, part: str) -> str:
    config = read_config(folder, f"{part}/config.json")
    if "d_model" in config:
        return f"T5, {config['num_layers']} layers of width {config['d_model']}, frozen"
    length = config.get("max_position_embeddings", 77)
    return f"CLIP, {config.get('num_hidden_layers')} layers of width {config.get('hidden_size')}, {length} tokens"


def _millions(module: nn.Module) -> str:
    count = sum(parameter.numel() for parameter in module.parameters())
    return f"{count / 1e6:.1f}M" if count < 1e7 else f"{count / 1e6:,.0f}M"


def _weights(folder: Path) -> str:
    safe = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    if safe:
        return f"safetensors, {safe / 1e9:.2f} GB"
    pickled = sum(file.stat().st_size for file in folder.rglob("*.bin"))
    return f"pickles, {pickled / 1e9:.2f} GB: only read with --allow-pickle" if pickled else "none here"
