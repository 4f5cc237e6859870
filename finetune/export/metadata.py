"""What an adapter file says of itself, in the header that UIs read. No paths, no captions, no file names."""

from __future__ import annotations

from datetime import UTC, datetime

from finetune.export.base import Adapter

KOHYA_BASE = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
ARCHITECTURE = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base",
}
IMPLEMENTATION = {
    "sd1": "diffusers",
    "sd2": "diffusers",
    "sdxl": "https://github.com/Stability-AI/generative-models",
}


def adapter_metadata(adapter: Adapter, about: dict[str, str], v_prediction: bool) -> dict[str, str]:
    """`ss_*` (Forge, A1111, sdnext) and `modelspec.*` 1.0.1 strings.

    `about`: title, trigger_phrase, resolution ("512x512"), and whatever else the run says of itself.
    """
    base, architecture = KOHYA_BASE[adapter.family], ARCHITECTURE[adapter.family]
    if adapter.family == "sd2" and v_prediction:
        base, architecture = "sd_v2_v", "stable-diffusion-v2-768-v"
    kohya = {
        "ss_base_model_version": base,
        "ss_v2": str(adapter.family == "sd2"),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(adapter.rank),
        "ss_network_alpha": str(adapter.alpha),
        "ss_output_name": about["title"],
    }
    spec = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{architecture}/lora",
        "implementation": IMPLEMENTATION[adapter.family],
        "title": about["title"],
        "resolution": about["resolution"],
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "trigger_phrase": about["trigger_phrase"],
        "prediction_type": "v" if v_prediction else "epsilon",
    }
    own = {f"finetune_{key}": about[key] for key in about.keys() - {"title", "resolution", "trigger_phrase"}}
    return kohya | {f"modelspec.{key}": value for key, value in spec.items()} | own


def checkpoint_metadata(family: str, about: dict[str, str], v_prediction: bool) -> dict[str, str]:
    """`modelspec.*` of a whole model."""
    architecture = ARCHITECTURE[family]
    if family == "sd2" and v_prediction:
        architecture = "stable-diffusion-v2-768-v"
    spec = {
        "sai_model_spec": "1.0.1",
        "architecture": architecture,
        "implementation": IMPLEMENTATION[family],
        "title": about["title"],
        "resolution": about["resolution"],
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "trigger_phrase": about["trigger_phrase"],
        "prediction_type": "v" if v_prediction else "epsilon",
    }
    return {f"modelspec.{key}": value for key, value in spec.items()}
