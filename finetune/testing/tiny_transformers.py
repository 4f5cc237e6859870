"""Small, real, randomly initialised SD3 and Flux bases for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from finetune.testing.tiny_unets import LENGTH, WORDS, save, tiny_text_config, tiny_tokenizer

T5_WIDTH = 48


def tiny_t5_tokenizer(folder: Path) -> Any:
    """A unigram tokenizer with the words of the tiny CLIP tokenizer, and single letters for everything else."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = [(chr(code), -9.0) for code in range(ord("!"), ord("~") + 1)]
    words = [("▁" + word, -3.0) for word in WORDS if len(word) > 1]
    tokenizer = transformers.T5Tokenizer(
        vocab=[*special, *letters, *words, ("▁a", -3.0)], extra_ids=0, model_max_length=LENGTH
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def tiny_t5(tokenizer: Any) -> Any:
    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=len(tokenizer), d_model=T5_WIDTH, d_kv=8, d_ff=64, num_layers=1, num_heads=4,
            feed_forward_proj="gated-gelu", dropout_rate=0.1,
        )
    )  # fmt: skip


def tiny_vae16() -> diffusers.AutoencoderKL:
    """A VAE with 16 channels, a shift factor and no quant convolutions, like those of SD3 and Flux."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=16,
        sample_size=32,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def write_sd3(folder: Path, seed: int) -> None:
    """Writes an SD3 base with two joint blocks; the first has the second attention of SD3.5 medium."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizers = [tiny_tokenizer(folder / name) for name in ("tokenizer", "tokenizer_2")]
        t5_tokenizer = tiny_t5_tokenizer(folder / "tokenizer_3")
        encoders = [
            transformers.CLIPTextModelWithProjection(tiny_text_config(tokenizer, width))
            for tokenizer, width in zip(tokenizers, (16, 24), strict=True)
        ]
        transformer = diffusers.SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=T5_WIDTH,
            caption_projection_dim=32,
            pooled_projection_dim=16 + 24,
            pos_embed_max_size=16,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )
        pipeline = diffusers.StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny_vae16(),
            text_encoder=encoders[0],
            tokenizer=tokenizers[0],
            text_encoder_2=encoders[1],
            tokenizer_2=tokenizers[1],
            text_encoder_3=tiny_t5(t5_tokenizer),
            tokenizer_3=t5_tokenizer,
        )
        save(pipeline, folder)


def write_flux(folder: Path, seed: int) -> None:
    """Writes a Flux base with one block of each kind, and guidance and resolution shift as in [dev]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, t5_tokenizer = tiny_tokenizer(folder / "tokenizer"), tiny_t5_tokenizer(folder / "tokenizer_2")
        transformer = diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        )
        pipeline = diffusers.FluxPipeline(
            transformer=transformer,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=tiny_vae16(),
            text_encoder=transformers.CLIPTextModel(tiny_text_config(tokenizer, 16)),
            tokenizer=tokenizer,
            text_encoder_2=tiny_t5(t5_tokenizer),
            tokenizer_2=t5_tokenizer,
        )
        save(pipeline, folder)
