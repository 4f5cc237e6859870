"""What a base is, told from its configs alone: no weights are read."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from finetune import families
from finetune.families.checkpoint import all_skeletons
from finetune.objectives import Schedule


def facts(folder: Path) -> dict[str, str]:
    """Family, objective, schedule, resolution, encoders, sizes and weights of a diffusers folder, as text.

    Raises:
        BadInput: it is no diffusers folder, or of no supported family.
    """
    family = families.family_of(folder)
    parts = all_skeletons(family, folder)
    scheduler = families.read_config(folder, "scheduler/scheduler_config.json")
    schedule = Schedule.from_config(scheduler)
    last = float(schedule.alphas_cumprod[-1])
    return {
        "family": f"{family.name} ({family.pipeline_class})",
        "predicts": schedule.prediction,
        "schedule": f"{scheduler.get('beta_schedule', 'linear')} {scheduler.get('beta_start', 1e-4):g} to "
        f"{scheduler.get('beta_end', 0.02):g}, {len(schedule.alphas_cumprod)} timesteps, "
        f"terminal SNR {last / (1 - last):.2g}",
        "resolution": f"{_resolution(folder)} pixels",
        **{part: _encoder(folder, part) for part in parts if part.startswith("text_encoder")},
        "parameters": ", ".join(f"{part} {_millions(module)}" for part, module in parts.items()),
        "weights": _weights(folder),
        "can train": "LoRA or full: denoiser, text_encoders",
    }


def _resolution(folder: Path) -> int:
    vae = families.read_config(folder, "vae/config.json")
    levels = len(vae.get("block_out_channels", (0,)))
    return int(families.read_config(folder, "unet/config.json").get("sample_size", 64)) * 2 ** (levels - 1)


def _encoder(folder: Path, part: str) -> str:
    config = families.read_config(folder, f"{part}/config.json")
    length = config.get("max_position_embeddings", 77)
    return f"{config.get('num_hidden_layers')} layers of width {config.get('hidden_size')}, {length} tokens"


def _millions(module: nn.Module) -> str:
    count = sum(parameter.numel() for parameter in module.parameters())
    return f"{count / 1e6:.1f}M" if count < 1e7 else f"{count / 1e6:,.0f}M"


def _weights(folder: Path) -> str:
    safe = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    if safe:
        return f"safetensors, {safe / 1e9:.2f} GB"
    pickled = sum(file.stat().st_size for file in folder.rglob("*.bin"))
    return f"pickles, {pickled / 1e9:.2f} GB: read with --allow-pickle only" if pickled else "none here"
