"""A small random base of DeepFloyd IF's first stage with the real classes, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import diffusers
import torch

from finetune.testing.tiny_transformers import T5_WIDTH, tiny_t5, tiny_t5_tokenizer
from finetune.testing.tiny_unets import save


def write(folder: Path, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_t5_tokenizer(folder / "tokenizer")
        unet = diffusers.UNet2DConditionModel(
            sample_size=16,
            in_channels=3,
            out_channels=6,
            block_out_channels=(16, 32),
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=8,
            cross_attention_dim=32,
            encoder_hid_dim=T5_WIDTH,
            encoder_hid_dim_type="text_proj",
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
            resnet_time_scale_shift="scale_shift",
            act_fn="gelu",
        )
        pipeline = diffusers.IFPipeline(
            tokenizer=tokenizer,
            text_encoder=tiny_t5(tokenizer),
            unet=unet,
            scheduler=diffusers.DDPMScheduler(
                beta_schedule="squaredcos_cap_v2", variance_type="learned_range", thresholding=True
            ),
            safety_checker=cast(Any, None),
            feature_extractor=cast(Any, None),
            watermarker=cast(Any, None),
            requires_safety_checker=False,
        )
        save(pipeline, folder)
