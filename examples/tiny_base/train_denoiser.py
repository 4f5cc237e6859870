"""Trains the tiny base's UNet from random weights with the toolkit's own loop, as full fine-tuning of a new base.

    python examples/tiny_base/train_denoiser.py data --out build       # renders and encodes the images
    python examples/tiny_base/train_denoiser.py init --out build       # writes build/base with a random UNet
    torchrun --nproc_per_node 2 examples/tiny_base/train_denoiser.py train --out build --steps 12000
    python examples/tiny_base/train_denoiser.py grow --out build       # more layers at 16x16
    torchrun --nproc_per_node 2 examples/tiny_base/train_denoiser.py train --out build --rate 5e-4 --steps 7000
    python examples/tiny_base/train_denoiser.py renew --out build      # begins a third stage
    torchrun --nproc_per_node 2 examples/tiny_base/train_denoiser.py train --out build --rate 7e-4 --steps 9000 \\
        --middle

After an interruption, start `train` again: it continues from its last checkpoint. `grow` and `renew` keep the
stage before in build/denoiser_1, build/denoiser_2.
"""

from __future__ import annotations

import argparse
import json
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import torch
from assemble import denoiser_weights, newest_checkpoint
from captions import caption
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from looks import NAMED, Facts, world_picture, world_scene
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_vae import to_pixels
from transformers import CLIPTextModel, CLIPTokenizer
from world import PIXELS, logo_place

from finetune.core.batch import Batch, Geometry, Latents
from finetune.core.events import sent_to
from finetune.core.rng import SampleKey
from finetune.families.source import load_family
from finetune.methods.full import Full
from finetune.objectives.densities import LogitNormal
from finetune.objectives.registry import build_objective
from finetune.objectives.settings import ObjectiveSettings
from finetune.optim.adamw import AdamW
from finetune.runs.folder import RunFolder
from finetune.runs.metrics import MetricsFile
from finetune.training.accelerate import make_accelerator
from finetune.training.settings import Run
from finetune.training.step import Step, StepOptions, parts_of
from finetune.training.trainer import Trainable, Trainer

PICTURES = 32000
BATCH = 64
LATENTS = 16  # the latents' height and width
BESIDE_LOGO = 1 / 4  # weight of the loss beside a logo: it has 7 % of the latents, and is learned last
SQUARE = Geometry((PIXELS, PIXELS), (0, 0), (PIXELS, PIXELS))
UNET = {
    "sample_size": LATENTS,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (64, 128, 160),
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "attention_head_dim": 4,  # the number of heads, under its historical name in diffusers
    "cross_attention_dim": 128,
}
GROWN = (3, 1, 1)  # layers per block of the second stage


def _render(index: int) -> tuple[np.ndarray, tuple[str, ...]]:
    picture, facts = world_picture(2, index)
    return np.asarray(picture), astuple(facts)


def make_data(out: Path) -> None:
    """latents.npz: mean and std [PICTURES, C, 16, 16] in fp16; facts.json: what each image shows."""
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
    vae = AutoencoderKL.from_pretrained(out / "vae")
    channels = vae.config.latent_channels
    unet = UNet2DConditionModel(in_channels=channels, out_channels=channels, **UNET)
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
    pipeline: Any = StableDiffusionPipeline(
        vae=vae,
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


def _mask(index: int, facts: Facts) -> Tensor:
    """The weight of each latent in an image's loss, [1, 16, 16]: a logo's are the heaviest."""
    if not (NAMED[facts.name].logo if facts.name else facts.logo):
        return torch.ones(1, LATENTS, LATENTS)
    scene, _ = world_scene(np.random.default_rng((2, index)))
    x, y, radius = logo_place(scene)
    at = (torch.arange(LATENTS) + 0.5) * 2 / LATENTS - 1
    near = ((at - y).abs()[:, None] < radius + 1 / LATENTS) & ((at - x).abs()[None, :] < radius + 1 / LATENTS)
    return torch.where(near, 1.0, BESIDE_LOGO)[None]


def grow(out: Path) -> None:
    """Writes build/base with the averaged weights of the newest checkpoint, and more residual blocks at 16x16, on the
    way down and up. They start as the identity: the larger UNet predicts what the smaller one does."""
    checkpoint = newest_checkpoint(out / "denoiser")
    weights = denoiser_weights(checkpoint)
    small = UNet2DConditionModel.from_pretrained(out / "base" / "unet")
    small.load_state_dict(weights)
    large = UNet2DConditionModel.from_config(dict(small.config) | {"layers_per_block": GROWN})
    down, up = large.down_blocks[0].resnets, large.up_blocks[-1].resnets
    last, top = len(up) - 1, f"up_blocks.{len(GROWN) - 1}.resnets"
    moved = {name.replace(f"{top}.1.", f"{top}.{last}."): value for name, value in weights.items()}
    left = large.load_state_dict(moved, strict=False)
    assert not left.unexpected_keys
    for block in (*down[1:], *up[1:last]):
        _become_identity(block)
    noisy, words = torch.randn(2, large.config["in_channels"], LATENTS, LATENTS), torch.randn(2, 8, 128)
    with torch.no_grad():
        torch.testing.assert_close(large(noisy, 500, words).sample, small(noisy, 500, words).sample)
    large.save_pretrained(out / "base" / "unet")
    _put_away(out)
    print("UNet parameters:", sum(p.numel() for p in large.parameters()), "from", checkpoint)


def renew(out: Path) -> None:
    """Writes build/base with the averaged weights of the newest checkpoint."""
    unet = UNet2DConditionModel.from_pretrained(out / "base" / "unet")
    unet.load_state_dict(denoiser_weights(newest_checkpoint(out / "denoiser")))
    unet.save_pretrained(out / "base" / "unet")
    _put_away(out)


def _put_away(out: Path) -> None:
    (out / "denoiser").rename(out / f"denoiser_{1 + len(list(out.glob('denoiser_[0-9]')))}")


def _become_identity(block: ResnetBlock2D) -> None:
    """The block's output becomes the first half of its input channels, or all of them if it keeps their number."""
    for value in block.conv2.parameters():
        nn.init.zeros_(value)
    if block.conv_shortcut is not None:
        for value in block.conv_shortcut.parameters():
            nn.init.zeros_(value)
        nn.init.dirac_(block.conv_shortcut.weight)


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
        masks = torch.stack([_mask(k, self.facts[k]) for k in chosen])
        names, ones = [str(k) for k in chosen], torch.ones(self.size)
        return Batch(latents, captions, ones, [SQUARE] * self.size, draws, names, masks)

    @staticmethod
    def _tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).float()


def train(out: Path, steps: int, rate: float, middle: bool) -> None:
    run = Run(
        steps=steps, batch_size=BATCH, ema=0.997, seed=3, precision="bf16", checkpoint_every=250, keep=2, log_every=25
    )
    accelerator = make_accelerator(run, adapter=False)
    family = load_family(str(out / "base"))
    trained = Full(parts=["denoiser"]).attach(family, run.seed)
    folder = RunFolder(out / "denoiser")
    folder.path.mkdir(parents=True, exist_ok=True)
    settings = ObjectiveSettings(density=LogitNormal()) if middle else ObjectiveSettings()
    objective = build_objective(settings, family.schedule)
    trainer = Trainer(
        Step(family, parts_of(trained), objective, family.encode_prompts, StepOptions(stratify=BATCH)),
        Trainable(trained),
        AdamW(lr=rate, betas=(0.9, 0.99), weight_decay=0.01, schedule="cosine", warmup=100),
        run,
        accelerator,
        folder.checkpoints,
    )
    # for so few tokens on a CPU plain products are quicker than flash attention: .0129 against .0157 s an image
    with sent_to(MetricsFile(folder.path)), sdpa_kernel(SDPBackend.MATH):
        trainer.fit(Rendered(out, accelerator.process_index, accelerator.num_processes))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["data", "init", "train", "grow", "renew"])
    parser.add_argument("--out", type=Path, default=Path("build"))
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--middle", action="store_true", help="more of the middle timesteps")
    arguments = parser.parse_args()
    if arguments.what == "train":
        train(arguments.out, arguments.steps, arguments.rate, arguments.middle)
    else:
        {"data": make_data, "init": init, "grow": grow, "renew": renew}[arguments.what](arguments.out)
