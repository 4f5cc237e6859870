"""Trains the tiny base's UNet from random weights with the toolkit's own loop, as full fine-tuning of a new base.

    python examples/tiny_base/train_denoiser.py data --out build       # renders and encodes the images
    python examples/tiny_base/train_denoiser.py init --out build       # writes build/base with a random UNet
    torchrun --nproc_per_node 4 examples/tiny_base/train_denoiser.py train --out build --steps 5000

After an interruption, start `train` again: it continues from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple
from pathlib import Path

import numpy as np
import torch
from captions import caption
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from train_vae import to_pixels
from transformers import CLIPTextModel, CLIPTokenizer
from world import Facts, world_picture

from finetune.core.batch import Batch, Geometry, Latents
from finetune.core.events import sent_to
from finetune.core.rng import SampleKey
from finetune.families.source import load_family
from finetune.methods.full import Full
from finetune.objectives.registry import build_objective
from finetune.objectives.settings import ObjectiveSettings
from finetune.optim.adamw import AdamW
from finetune.runs.folder import RunFolder
from finetune.runs.metrics import MetricsFile
from finetune.training.accelerate import make_accelerator
from finetune.training.settings import Run
from finetune.training.step import Step, StepOptions, parts_of
from finetune.training.trainer import Trainable, Trainer

PICTURES = 24000
BATCH = 64
SQUARE = Geometry((64, 64), (0, 0), (64, 64))
UNET = {
    "sample_size": 16,
    "in_channels": 8,
    "out_channels": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (64, 128, 160),
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "attention_head_dim": 4,  # the number of heads, under its historical name in diffusers
    "cross_attention_dim": 128,
}


def _render(index: int) -> tuple[np.ndarray, tuple[str, ...]]:
    picture, facts = world_picture(2, index)
    return np.asarray(picture), astuple(facts)


def make_data(out: Path) -> None:
    """latents.npz: mean and std [PICTURES, 8, 16, 16] in fp16; facts.json: what each image shows."""
    torch.set_num_threads(1)
    with ProcessPoolExecutor() as pool:
        pictures, facts = zip(*pool.map(_render, range(PICTURES), chunksize=200), strict=True)
    (out / "facts.json").write_text(json.dumps(facts))
    np.save(out / "pictures.npy", np.stack(pictures))
    with ProcessPoolExecutor(initializer=torch.set_num_threads, initargs=(1,)) as pool:
        chunks = list(pool.map(_encode, [(out, start) for start in range(0, PICTURES, 1000)]))
    np.savez(
        out / "latents.npz", mean=np.concatenate([c[0] for c in chunks]), std=np.concatenate([c[1] for c in chunks])
    )


@torch.no_grad()
def _encode(work: tuple[Path, int]) -> tuple[np.ndarray, np.ndarray]:
    out, start = work
    vae = AutoencoderKL.from_pretrained(out / "vae")
    bank = np.load(out / "pictures.npy", mmap_mode="r")
    means, stds = [], []
    for first in range(start, start + 1000, 50):
        latent = vae.encode(to_pixels(np.array(bank[first : first + 50]))).latent_dist
        means.append(latent.mean.half().numpy())
        stds.append(latent.std.half().numpy())
    return np.concatenate(means), np.concatenate(stds)


def init(out: Path) -> None:
    """Writes build/base: the trained VAE, text encoder and tokenizer, and a UNet with random weights."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**UNET)
    for name, module in unet.named_modules():
        if name.endswith(("conv2", "proj_out")) or name == "conv_out":
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(out / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(out / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(out / "tokenizer"),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(out / "base", safe_serialization=True)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(out / "tokenizer" / name, out / "base" / "tokenizer" / name)
    print("UNet parameters:", sum(p.numel() for p in unet.parameters()))


class Rendered:
    """Batches from latents in memory. The image and its caption are functions of (seed, step, sample)."""

    def __init__(self, out: Path, rank: int, world: int) -> None:
        with np.load(out / "latents.npz") as held:
            self.mean, self.std = held["mean"], held["std"]
        self.facts = [Facts(*row) for row in json.loads((out / "facts.json").read_text())]
        self.rank, self.size = rank, BATCH // world

    def micro(self, step: int, index: int) -> Batch:
        slots = range(self.rank * self.size, (self.rank + 1) * self.size)
        rngs = [np.random.default_rng((3, step, slot)) for slot in slots]
        chosen = [int(rng.integers(len(self.facts))) for rng in rngs]
        captions = [caption(self.facts[k], rng)[0] for k, rng in zip(chosen, rngs, strict=True)]
        latents = Latents(self._tensor(self.mean[chosen]), self._tensor(self.std[chosen]))
        draws = [SampleKey(3, step, slot) for slot in slots]
        return Batch(latents, captions, torch.ones(self.size), [SQUARE] * self.size, draws, [str(k) for k in chosen])

    @staticmethod
    def _tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).float()


def train(out: Path, steps: int) -> None:
    run = Run(
        steps=steps, batch_size=BATCH, ema=0.997, seed=3, precision="bf16", checkpoint_every=250, keep=2, log_every=25
    )
    accelerator = make_accelerator(run, adapter=False)
    family = load_family(str(out / "base"))
    trained = Full(parts=["denoiser"]).attach(family, run.seed)
    folder = RunFolder(out / "denoiser")
    folder.path.mkdir(parents=True, exist_ok=True)
    objective = build_objective(ObjectiveSettings(), family.schedule)
    trainer = Trainer(
        Step(family, parts_of(trained), objective, family.encode_prompts, StepOptions(stratify=BATCH)),
        Trainable(trained),
        AdamW(lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, schedule="cosine", warmup=100),
        run,
        accelerator,
        folder.checkpoints,
    )
    with sent_to(MetricsFile(folder.path)):
        trainer.fit(Rendered(out, accelerator.process_index, accelerator.num_processes))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["data", "init", "train"])
    parser.add_argument("--out", type=Path, default=Path("build"))
    parser.add_argument("--steps", type=int, default=5000)
    arguments = parser.parse_args()
    if arguments.what == "train":
        train(arguments.out, arguments.steps)
    else:
        {"data": make_data, "init": init}[arguments.what](arguments.out)
