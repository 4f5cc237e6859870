"""Runs LoRA training on a CPU with a base of SD 1.5's real size and random weights: measures memory and time.

    python benchmarks/full_size.py                # 3 steps at 256 pixels; about 5 GB on the disk, 8 GB of memory
    python benchmarks/full_size.py --steps-only   # caches and steps alone, as tests/jobs/test_full_size.py runs them

The images are noise. The run shows that every part of the job, from photos to checked exports, works with the real
sizes. It uses CLIP's real tokenizer if ../shared/clip-vocab exists, and otherwise the small one of the tests.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memory import peak_memory

if TYPE_CHECKING:
    from finetune.config.recipe import Recipe

ROOT = Path(__file__).parents[1]
CLIP = ROOT / ".." / "shared" / "clip-vocab"


def write_sd15(folder: Path) -> None:
    """SD 1.5's published configuration, random weights, fp16 safetensors."""
    import diffusers
    import torch
    import transformers

    from finetune.testing.tiny_unets import tiny_scheduler, tiny_tokenizer

    torch.manual_seed(0)
    real = (CLIP / "vocab.json").is_file()
    tokenizer = (
        transformers.CLIPTokenizer.from_pretrained(CLIP, model_max_length=77) if real else tiny_tokenizer(folder)
    )
    text = transformers.CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    pipeline: Any = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
        ),
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        scheduler=tiny_scheduler("epsilon"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder)


def train_only(recipe: Recipe, work: Path) -> Path:
    """Caches latents and prompts and trains, without images and exports. Returns the run folder."""
    from finetune.core.events import sent_to
    from finetune.jobs.fit import fit_job
    from finetune.jobs.prepare import prepare
    from finetune.runs.folder import RunFolder
    from finetune.runs.metrics import MetricsFile
    from finetune.training.accelerate import make_accelerator

    accelerator = make_accelerator(recipe.run, adapter=True)
    folder = RunFolder(work / f"steps-{os.getpid()}")
    with folder.held(recipe), sent_to(MetricsFile(folder.path)):
        fit_job(prepare(recipe), folder, accelerator)
    return folder.path


def main() -> None:
    from finetune.core.logging import quiet

    quiet()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "finetune-full-size")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--steps-only", action="store_true")
    parser.add_argument("--fast", choices=["auto", "off"], default="auto", help="off: slower steps, in less memory")
    arguments = parser.parse_args()
    base = arguments.work / "sd15"
    if not (base / "model_index.json").is_file():
        write_sd15(base)
        print(f"wrote {base}; start again to train on it (so that the peak memory is the run's alone)")
        return
    os.environ.setdefault("FINETUNE_CACHE", str(arguments.work / "cache"))
    from finetune import load_recipe, train
    from finetune.jobs.demo import demo_images

    settings = [
        f"data.photos={demo_images()}", "data.class_noun=mug", f"base={base}", "data.resolution=256",
        f"run.steps={arguments.steps}", "run.precision=fp32", "run.gradient_checkpointing=true", "sample.steps=2",
        "sample.count=1", "sample.prompts=['a photo of {token} {noun}']", "optim.lr=1e-3", "run.name=full-size",
        f"run.fast={arguments.fast}",
    ]  # fmt: skip
    began = time.perf_counter()
    if arguments.steps_only:
        run = train_only(load_recipe("sd15-lora", [*settings, "prior.kind=none", "data.token=sks"]), arguments.work)
    else:
        recipe = load_recipe("sd15-lora", [*settings, "prior.count=2", "prior.steps=2"])
        run = train(recipe, arguments.work / f"run-{os.getpid()}", print)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    peak = peak_memory() / 2**30
    print("steps", [(round(step["loss"], 4), f"{step['seconds']:.1f} s") for step in steps])
    print(f"whole job {time.perf_counter() - began:.0f} s, peak memory {peak:.1f} GiB, page {run}/report.html")


if __name__ == "__main__":
    main()
