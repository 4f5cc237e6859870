"""Trains the tiny base's VAE (64x64 images <-> 16x16x8 latents) from random weights. It can be resumed.

    python examples/tiny_base/train_vae.py bank --out build                       # renders the images
    torchrun --nproc_per_node 4 examples/tiny_base/train_vae.py train --out build --minutes 40

It does not use the toolkit's loop, because a VAE has another loss (reconstruction) and no text, noise or timesteps.
On a CPU, several processes with one thread each that average gradients over gloo are far faster than one process with
several threads.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from world import subject_picture, wild_picture, world_picture

PICTURES, HOLD_OUT = 24000, 512
CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (32, 48, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 8,
    "sample_size": 64,
    "scaling_factor": 1.0,
    "mid_block_add_attention": False,
}


def bank_picture(index: int) -> np.ndarray:
    """Even indices are wild images, odd ones captioned images; the last ones are held out."""
    picture = wild_picture(1, index) if index % 2 == 0 else world_picture(1, index)[0]
    return np.asarray(picture)


def make_bank(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    bank = np.lib.format.open_memmap(out / "vae_bank.npy", "w+", np.uint8, (PICTURES + HOLD_OUT, 64, 64, 3))
    with ProcessPoolExecutor() as pool:
        for index, picture in enumerate(pool.map(bank_picture, range(len(bank)), chunksize=200)):
            bank[index] = picture
    bank.flush()


def to_pixels(pictures: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def make_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderKL(**CONFIG)
    for module in vae.modules():
        if module.__class__.__name__ == "ResnetBlock2D":
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
    return vae.to(memory_format=torch.channels_last)


def edges(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    laplacian = 4 * x[..., 1:-1, 1:-1] - x[..., :-2, 1:-1] - x[..., 2:, 1:-1] - x[..., 1:-1, :-2] - x[..., 1:-1, 2:]
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1], laplacian


def loss_of(vae: AutoencoderKL, pixels: Tensor, noise: float) -> Tensor:
    """L1 + 4 MSE + gradient + Laplacian + 5e-3 KL per latent value; `noise` on the latents makes decoding robust."""
    latent = vae.encode(pixels).latent_dist
    z = latent.sample()
    if noise:
        z = z + noise * z.detach().std() * torch.randn_like(z)
    out = vae.decode(z).sample.float()
    sharp = sum(F.l1_loss(a, b) for a, b in zip(edges(out), edges(pixels), strict=True))
    kl = latent.kl().mean() / latent.mean[0].numel()
    return F.l1_loss(out, pixels) + 4 * F.mse_loss(out, pixels) + sharp + 5e-3 * kl


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: np.ndarray) -> float:
    """Mean PSNR in dB over images that are decoded from the latents' means and rounded to 8 bits."""
    values = []
    for start in range(0, len(pictures), 64):
        pixels = to_pixels(pictures[start : start + 64]).contiguous(memory_format=torch.channels_last)
        out = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
        mse = (((out - pixels) * 127.5).round().square()).flatten(1).mean(1)
        values.append(10 * torch.log10(255**2 / mse.clamp(min=1e-6)))
    return float(torch.cat(values).mean())


def train(out: Path, minutes: float, batch: int, lr: float) -> None:
    """Trains for `minutes` of wall time with a cosine schedule over that time. After a resume, time already spent
    counts."""
    torch.set_num_threads(1)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo")
    bank = np.load(out / "vae_bank.npy", mmap_mode="r")
    vae = make_vae()
    averages = {name: value.detach().clone() for name, value in vae.named_parameters()}
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    step, spent = _resume(out, vae, averages, optimizer)
    began, generator = time.time() - spent, np.random.default_rng((rank, step))
    torch.manual_seed(1000 * rank + step)
    while True:
        now = torch.tensor((time.time() - began) / 60 / minutes)
        if world > 1:
            dist.broadcast(now, 0)
        progress = float(now)
        if progress >= 1:
            break
        rate = lr * min(1, (step + 1) / 100) * max(0.01, 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = np.sort(generator.integers(0, PICTURES, batch // world))
        pixels = to_pixels(bank[chosen]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(vae, pixels, 0.15 if progress > 0.5 else 0.0)
        loss.backward()
        _average_gradients(vae, world)
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(
            list(averages.values()), [p.detach() for p in vae.parameters()], 0.002 if step > 500 else 0.05
        )
        step += 1
        if rank == 0 and step % 100 == 0:
            _report(out, vae, averages, bank, step, time.time() - began, float(loss))
        if rank == 0 and step % 500 == 0:
            _save(out, vae, averages, optimizer, step, time.time() - began)
    if rank == 0:
        _save(out, vae, averages, optimizer, step, time.time() - began)
        _finish(out, vae, averages, bank)
    if world > 1:
        dist.barrier()


def _average_gradients(vae: nn.Module, world: int) -> None:
    if world == 1:
        return
    gradients = [parameter.grad for parameter in vae.parameters()]
    flat = torch.cat([gradient.flatten() for gradient in gradients]) / world
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def _report(
    out: Path,
    vae: AutoencoderKL,
    averages: dict[str, Tensor],
    bank: np.ndarray,
    step: int,
    seconds: float,
    loss: float,
) -> None:
    held = _averaged(vae, averages)
    line = {
        "step": step,
        "minutes": round(seconds / 60, 2),
        "loss": loss,
        "psnr": psnr(held, bank[PICTURES : PICTURES + 64]),
    }
    with (out / "vae_log.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def _averaged(vae: AutoencoderKL, averages: dict[str, Tensor]) -> AutoencoderKL:
    copy = AutoencoderKL(**CONFIG).to(memory_format=torch.channels_last)
    copy.load_state_dict(averages)
    return copy


def _save(
    out: Path,
    vae: AutoencoderKL,
    averages: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    step: int,
    seconds: float,
) -> None:
    tensors = {f"w.{k}": v.detach().contiguous() for k, v in vae.named_parameters()}
    tensors |= {f"a.{k}": v.contiguous() for k, v in averages.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"o.{index}.{key}": value.contiguous() for key, value in state.items()}
    save_file(tensors, out / "vae_train.tmp", metadata={"step": str(step), "seconds": str(seconds)})
    (out / "vae_train.tmp").replace(out / "vae_train.safetensors")


def _resume(
    out: Path, vae: AutoencoderKL, averages: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    file = out / "vae_train.safetensors"
    if not file.is_file():
        return 0, 0.0
    from safetensors import safe_open

    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    vae.load_state_dict({k[2:]: v for k, v in tensors.items() if k.startswith("w.")})
    averages |= {k[2:]: v for k, v in tensors.items() if k.startswith("a.")}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("o."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return int(about["step"]), float(about["seconds"])


@torch.no_grad()
def whiten(vae: AutoencoderKL, pictures: np.ndarray) -> None:
    """Folds per-channel whitening into the quant convolutions, so that latents have mean 0 and deviation 1."""
    latents = torch.cat(
        [vae.encode(to_pixels(pictures[k : k + 64])).latent_dist.mean for k in range(0, len(pictures), 64)]
    )
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:channels] /= std.view(-1, 1, 1, 1)
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()  # the log-variance
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
    post.weight *= std.view(1, -1, 1, 1)


def _finish(out: Path, vae: AutoencoderKL, averages: dict[str, Tensor], bank: np.ndarray) -> None:
    held = _averaged(vae, averages).eval()
    before = psnr(held, bank[PICTURES:])
    whiten(held, bank[:2048])
    after = psnr(held, bank[PICTURES:])
    subjects = np.stack(
        [np.asarray(subject_picture(name, k)) for name in ("mug", "backpack", "car") for k in range(20)]
    )
    held.save_pretrained(out / "vae")
    figures = {"psnr": after, "psnr_before_whitening": before, "psnr_subjects": psnr(held, subjects)}
    (out / "vae.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["bank", "train"])
    parser.add_argument("--out", type=Path, default=Path("build"))
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    arguments = parser.parse_args()
    if arguments.what == "bank":
        make_bank(arguments.out)
    else:
        train(arguments.out, arguments.minutes, arguments.batch, arguments.lr)
