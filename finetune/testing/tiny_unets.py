"""Small, randomly initialised bases of the real classes for tests, with a few hundred thousand weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
import transformers

WORDS = (
    "a an the of in on at by photo picture drawing dog mug cat toy bag car beach snow night city table red "
    "blue green style small large grass sks ohwx zwx vtx qbv xjy rpz kwg"
).split()
LENGTH = 16


def tiny_tokenizer(folder: Path) -> Any:
    """CLIP's byte-pair scheme with a few words, each a single token. Later words have higher ids, like rare words in
    CLIP."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = [chr(byte) for byte in plain] + [chr(256 + k) for k in range(256 - len(plain))]
    vocab = {text: k for k, text in enumerate([*symbols, *[symbol + "</w>" for symbol in symbols]])}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        left = word[0] if len(word) > 1 else ""
        for k in range(1, len(word)):
            right = word[k] + ("</w>" if k == len(word) - 1 else "")
            if left + right not in vocab:
                merges.append((left, right))
                vocab[left + right] = len(vocab)
            left += right
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=cast(Any, merges), model_max_length=LENGTH)
    assert len(tokenizer) == len(vocab)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8", newline="\n")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    return tokenizer


def tiny_text_config(tokenizer: Any, width: int) -> Any:
    return transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tiny_vae() -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
        scaling_factor=0.5,
    )


def tiny_unet(cross_width: int, **extra: Any) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        cross_attention_dim=cross_width,
        **extra,
    )


def tiny_scheduler(prediction: str) -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        clip_sample=False,
        steps_offset=1,
    )


def write_sd(folder: Path, seed: int, linear_projection: bool) -> None:
    """SD1 (epsilon, convolutional projections) or SD2 (v, linear ones)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer(folder / "tokenizer")
        encoder = transformers.CLIPTextModel(tiny_text_config(tokenizer, 16))
        pipeline = diffusers.StableDiffusionPipeline(
            vae=tiny_vae(),
            text_encoder=encoder,
            tokenizer=tokenizer,
            unet=tiny_unet(16, use_linear_projection=linear_projection),
            scheduler=tiny_scheduler("v_prediction" if linear_projection else "epsilon"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        save(pipeline, folder)


def write_sdxl(folder: Path, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizers = [tiny_tokenizer(folder / name) for name in ("tokenizer", "tokenizer_2")]
        first = transformers.CLIPTextModel(tiny_text_config(tokenizers[0], 16))
        second = transformers.CLIPTextModelWithProjection(tiny_text_config(tokenizers[1], 24))
        unet = tiny_unet(
            40,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8,
        )
        pipeline = diffusers.StableDiffusionXLPipeline(
            vae=tiny_vae(),
            text_encoder=first,
            text_encoder_2=second,
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            unet=unet,
            scheduler=tiny_scheduler("epsilon"),
            add_watermarker=False,
        )
        save(pipeline, folder)


def write_sdxl_refiner(folder: Path, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer(folder / "tokenizer_2")
        unet = tiny_unet(
            24,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 5 * 8,
        )
        pipeline = diffusers.StableDiffusionXLImg2ImgPipeline(
            vae=tiny_vae(),
            text_encoder=cast(Any, None),
            text_encoder_2=transformers.CLIPTextModelWithProjection(tiny_text_config(tokenizer, 24)),
            tokenizer=cast(Any, None),
            tokenizer_2=tokenizer,
            unet=unet,
            scheduler=tiny_scheduler("epsilon"),
            requires_aesthetics_score=True,
            add_watermarker=False,
        )
        save(pipeline, folder)


def save(pipeline: Any, folder: Path) -> None:
    """Saves the pipeline, and also the tokenizer files for older readers, which diffusers does not write."""
    kept = {file: file.read_bytes() for file in folder.glob("tokenizer*/*") if file.suffix in (".json", ".txt")}
    pipeline.save_pretrained(folder, safe_serialization=True)
    for file, content in kept.items():
        file.write_bytes(content)
