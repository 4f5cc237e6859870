"""What an exported file says of itself, in the header that UIs read."""

from __future__ import annotations

from datetime import UTC, datetime

from finetune.export.base import Adapter

KOHYA_BASE = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
ARCHITECTURE = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base",
}
SPECIFIED = {"title", "resolution", "date", "trigger_phrase"}  # have a place in modelspec
IMPLEMENTATION = {
    "sd1": "diffusers",
    "sd2": "diffusers",
    "sdxl": "https://github.com/Stability-AI/generative-models",
}


def adapter_metadata(adapter: Adapter, about: dict[str, str], v_prediction: bool) -> dict[str, str]:
    """`ss_*` (Forge, A1111, sdnext), `modelspec.*` 1.0.1 and `finetune_*` strings.

    `about`: title, resolution ("512x512"), trigger_phrase, and whatever else the run says of itself.
    """
    v2_768 = adapter.family == "sd2" and v_prediction
    kohya = {
        "ss_base_model_version": "sd_v2_v" if v2_768 else KOHYA_BASE[adapter.family],
        "ss_v2": str(adapter.family == "sd2"),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(adapter.rank),
        "ss_network_alpha": str(adapter.alpha),
        "ss_output_name": about["title"],
    }
    return kohya | checkpoint_metadata(adapter.family, about, v_prediction, kind="/lora")


def checkpoint_metadata(family: str, about: dict[str, str], v_prediction: bool, kind: str = "") -> dict[str, str]:
    """`modelspec.*` and `finetune_*` strings; what is empty is left out."""
    architecture = "stable-diffusion-v2-768-v" if family == "sd2" and v_prediction else ARCHITECTURE[family]
    spec = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{architecture}{kind}",
        "implementation": IMPLEMENTATION[family],
        "title": about["title"],
        "resolution": about["resolution"],
        "date": about.get("date", datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")),
        "trigger_phrase": about["trigger_phrase"],
        "prediction_type": "v" if v_prediction else "epsilon",
    }
    own = {f"finetune_{key}": about[key] for key in about.keys() - SPECIFIED}
    return {f"modelspec.{key}": value for key, value in spec.items() if value} | own
