"""The published configurations of the real models as JSON, without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CLIP_L = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "projection_dim": 768,
}  # fmt: skip
OPEN_CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
OPEN_CLIP_G = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "projection_dim": 1280,
}  # fmt: skip
T5_XXL = {
    "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu", "model_type": "t5",
}  # fmt: skip


def vae(channels: int, **extra: Any) -> dict[str, Any]:
    levels = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    sizes = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": channels}
    return {"_class_name": "AutoencoderKL", **levels, **sizes, **extra}


def sd3(**extra: Any) -> dict[str, Any]:
    sizes = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
    shared = {"attention_head_dim": 64, "in_channels": 16, "out_channels": 16, "joint_attention_dim": 4096}
    texts = {"pooled_projection_dim": 2048, "sample_size": 128, "patch_size": 2}
    return {"_class_name": "SD3Transformer2DModel", **shared, **texts, **sizes, **extra}


SD1 = {
    "unet": {"_class_name": "UNet2DConditionModel", "in_channels": 4, "sample_size": 64, "cross_attention_dim": 768,
             "attention_head_dim": 8},
    "text_encoder": CLIP_L,
    "vae": vae(4),
    "scheduler": {"_class_name": "PNDMScheduler", **SCALED},
}  # fmt: skip
SD2 = {
    "unet": {"_class_name": "UNet2DConditionModel", "in_channels": 4, "sample_size": 96, "cross_attention_dim": 1024,
             "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
    "text_encoder": OPEN_CLIP_H,
    "vae": vae(4),
    "scheduler": {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", **SCALED},
}  # fmt: skip
SDXL: dict[str, Any] = {
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "in_channels": 4,
        "out_channels": 4,
        "sample_size": 128,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "text_encoder": CLIP_L,
    "text_encoder_2": OPEN_CLIP_G,
    "vae": vae(4, sample_size=1024, scaling_factor=0.13025),
    "scheduler": {"_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon", **SCALED},
}
SDXL_REFINER = {
    "unet": SDXL["unet"]
    | {
        "block_out_channels": [384, 768, 1536, 1536],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": 4,
        "attention_head_dim": [6, 12, 24, 24],
        "cross_attention_dim": 1280,
        "projection_class_embeddings_input_dim": 2560,
    },
    "text_encoder_2": OPEN_CLIP_G,
    "vae": SDXL["vae"],
    "scheduler": SDXL["scheduler"],
}
SD3_TEXTS = {"text_encoder": CLIP_L, "text_encoder_2": OPEN_CLIP_G, "text_encoder_3": T5_XXL}
VAE_16 = {"sample_size": 1024, "use_quant_conv": False, "use_post_quant_conv": False}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
SD3_MEDIUM = {
    "transformer": sd3(),
    **SD3_TEXTS,
    "vae": vae(16, scaling_factor=1.5305, shift_factor=0.0609, **VAE_16),
    "scheduler": FLOW,
}
SD35_MEDIUM = SD3_MEDIUM | {
    "transformer": sd3(dual_attention_layers=list(range(13)), qk_norm="rms_norm", pos_embed_max_size=384)
}
SD35_LARGE = SD3_MEDIUM | {
    "transformer": sd3(num_layers=38, num_attention_heads=38, caption_projection_dim=2432, qk_norm="rms_norm")
}
FLUX = {
    "transformer": {
        "_class_name": "FluxTransformer2DModel",
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": [16, 56, 56],
    },
    "text_encoder": CLIP_L,
    "text_encoder_2": T5_XXL,
    "vae": vae(16, scaling_factor=0.3611, shift_factor=0.1159, **VAE_16),
    "scheduler": {**FLOW, "use_dynamic_shifting": True},
}
# name -> (family, pipeline class, configs, millions of parameters of the denoiser)
PUBLISHED: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "SD 1.5": ("sd1", "StableDiffusionPipeline", SD1, 860),
    "SD 2.1": ("sd2", "StableDiffusionPipeline", SD2, 866),
    "SDXL": ("sdxl", "StableDiffusionXLPipeline", SDXL, 2567),
    "SDXL refiner": ("sdxl-refiner", "StableDiffusionXLImg2ImgPipeline", SDXL_REFINER, 2260),  # 2,259.5
    "SD3 medium": ("sd3", "StableDiffusion3Pipeline", SD3_MEDIUM, 2028),
    "SD3.5 medium": ("sd3", "StableDiffusion3Pipeline", SD35_MEDIUM, 2243),
    "SD3.5 large": ("sd3", "StableDiffusion3Pipeline", SD35_LARGE, 8057),
    "Flux.1 dev": ("flux", "FluxPipeline", FLUX, 11901),
}


def write(name: str, folder: Path) -> Path:
    """Writes the diffusers folder of a published model, with configs but no weights, and returns it."""
    _, kind, parts, _ = PUBLISHED[name]
    for part, config in parts.items():
        (folder / part).mkdir(parents=True)
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part / file).write_text(json.dumps(config), encoding="utf-8", newline="\n")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}), encoding="utf-8", newline="\n")
    return folder
