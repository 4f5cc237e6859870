"""Trains the tiny base's VAE (128x128 images <-> 16x16x16 latents) from random weights. It can be resumed.

    python examples/tiny_base/train_vae.py bank --out build                       # renders the images
    torchrun --nproc_per_node 2 examples/tiny_base/train_vae.py train --out build

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
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from fast_norm import quicken
from looks import DEVELOPMENT, subject_picture, wild_picture, world_picture
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from world import PIXELS

PICTURES, HOLD_OUT = 16000, 512
CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 32, 64, 96),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 16,
    "sample_size": PIXELS,
    "scaling_factor": 1.0,
    "mid_block_add_attention": False,
}


def bank_picture(index: int) -> np.ndarray:
    """Even indices are wild images, odd ones captioned images; the last ones are held out."""
    picture = wild_picture(1, index) if index % 2 == 0 else world_picture(1, index)[0]
    return np.asarray(picture)


def make_bank(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    bank = np.lib.format.open_memmap(out / "vae_bank.npy", "w+", np.uint8, (PICTURES + HOLD_OUT, PIXELS, PIXELS, 3))
    with ProcessPoolExecutor() as pool:
        for index, picture in enumerate(pool.map(bank_picture, range(len(bank)), chunksize=200)):
            bank[index] = picture
    bank.flush()


def to_pixels(pictures: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def make_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    vae = _new_vae()
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            for value in module.conv2.parameters():
                nn.init.zeros_(value)
    return vae


def _new_vae(**other: Any) -> AutoencoderKL:
    """A VAE with random weights; `other` replaces values of CONFIG."""
    vae: AutoencoderKL = AutoencoderKL(**(CONFIG | other))
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-arg]  # its decorator hides self
    return vae


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
    loss: Tensor = F.l1_loss(out, pixels) + 4 * F.mse_loss(out, pixels) + sharp + 5e-3 * kl
    return loss


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


def train(out: Path, steps: int, batch: int, lr: float) -> None:
    """Trains up to `steps` steps, with a cosine schedule over them."""
    torch.set_num_threads(1)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo")
    bank = np.load(out / "vae_bank.npy", mmap_mode="r")
    vae = make_vae()
    averages = {name: value.detach().clone() for name, value in vae.named_parameters()}
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    quicken(vae)
    first, spent = _resume(out, vae, averages, optimizer)
    began, generator = time.time() - spent, np.random.default_rng((rank, first))
    torch.manual_seed(1000 * rank + first)
    for step in range(first, steps):
        progress = step / steps
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
        if rank == 0 and (step + 1) % 100 == 0:
            _report(out, vae, averages, bank, step + 1, time.time() - began, float(loss))
            _save(out, vae, averages, optimizer, step + 1, time.time() - began)
    if rank == 0:
        _save(out, vae, averages, optimizer, steps, time.time() - began)
        _finish(out, vae, averages, bank)
    if world > 1:
        dist.barrier()


def _average_gradients(vae: nn.Module, world: int) -> None:
    if world == 1:
        return
    gradients = [parameter.grad for parameter in vae.parameters() if parameter.grad is not None]
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
    copy = _new_vae()
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
def prune(vae: AutoencoderKL, pictures: np.ndarray) -> AutoencoderKL:
    """The same VAE without the latent channels that hold more noise than image, and with whitened ones: each sampled
    channel has mean 0 and deviation 1.

    The KL term leaves some channels unused. Whitened by their means alone they would be noise that is ten times as
    large as the rest, and a denoiser could learn little else. The quant convolutions are folded into their
    neighbours, as far as zero padding allows: at the border a constant of the decoder's first layer is approximated.
    """
    parts = [vae.encode(to_pixels(pictures[k : k + 64])).latent_dist for k in range(0, len(pictures), 64)]
    means, noise = torch.cat([part.mean for part in parts]), torch.cat([part.var for part in parts]).mean((0, 2, 3))
    live = (noise < means.var((0, 2, 3))).nonzero()[:, 0]
    shift, scale = means.mean((0, 2, 3)), (means.var((0, 2, 3)) + noise).sqrt()[live]
    small = _new_vae(latent_channels=len(live))
    shapes = {name: value.shape for name, value in small.state_dict().items()}
    small.load_state_dict({k: v for k, v in vae.state_dict().items() if shapes[k] == v.shape}, strict=False)
    _prune_encoder(vae, small, live, shift, scale)
    _prune_decoder(vae, small, live, shift, scale)
    return small


def _prune_encoder(vae: AutoencoderKL, small: AutoencoderKL, live: Tensor, shift: Tensor, scale: Tensor) -> None:
    (last, last_bias), count = _values(vae.encoder.conv_out), len(shift)
    quant, bias = _values(vae.quant_conv)
    weight = quant[:, :, 0, 0]
    rows = torch.cat([weight[live] / scale[:, None], weight[count + live]])
    offset = torch.cat([(bias[live] - shift[live]) / scale, bias[count + live] - 2 * scale.log()])  # the log-variance
    _set(small.encoder.conv_out, torch.einsum("om,mihw->oihw", rows, last), rows @ last_bias + offset)
    _set(small.quant_conv, torch.eye(len(rows))[:, :, None, None], torch.zeros(len(rows)))


def _prune_decoder(vae: AutoencoderKL, small: AutoencoderKL, live: Tensor, shift: Tensor, scale: Tensor) -> None:
    (first, first_bias), (quant, bias) = _values(vae.decoder.conv_in), _values(vae.post_quant_conv)
    post = quant[:, :, 0, 0]
    constant = post @ shift + bias
    inside = torch.linalg.lstsq(post[:, live], constant[:, None]).solution[:, 0]
    rest = constant - post[:, live] @ inside
    _set(small.post_quant_conv, torch.diag(scale)[:, :, None, None], inside)
    weight = torch.einsum("omhw,ml->olhw", first, post[:, live])
    _set(small.decoder.conv_in, weight, first_bias + torch.einsum("omhw,m->o", first, rest))


def _values(layer: nn.Conv2d | None) -> tuple[Tensor, Tensor]:
    """The weight and the bias; this VAE has every convolution, with both."""
    assert layer is not None
    assert layer.bias is not None
    return layer.weight, layer.bias


def _set(layer: nn.Conv2d | None, weight: Tensor, bias: Tensor) -> None:
    for own, value in zip(_values(layer), (weight, bias), strict=True):
        own.copy_(value)


def _finish(out: Path, vae: AutoencoderKL, averages: dict[str, Tensor], bank: np.ndarray) -> None:
    held = _averaged(vae, averages).eval()
    before = psnr(held, bank[PICTURES:])
    held = prune(held, bank[:2048])
    after = psnr(held, bank[PICTURES:])
    subjects = np.stack([np.asarray(subject_picture(name, k)) for name in DEVELOPMENT for k in range(20)])
    held.save_pretrained(out / "vae")
    figures = {"psnr": after, "psnr_before_pruning": before, "psnr_subjects": psnr(held, subjects)}
    (out / "vae.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["bank", "train"])
    parser.add_argument("--out", type=Path, default=Path("build"))
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    arguments = parser.parse_args()
    if arguments.what == "bank":
        make_bank(arguments.out)
    else:
        train(arguments.out, arguments.steps, arguments.batch, arguments.lr)
