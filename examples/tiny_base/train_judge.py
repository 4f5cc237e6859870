"""Trains the judge (judge.py) on renders, sets its threshold, and measures how often it errs.

python examples/tiny_base/train_judge.py               # trains it; writes judge.safetensors and judge.json
python examples/tiny_base/train_judge.py --stage 1     # goes on with other renders
python examples/tiny_base/train_judge.py --stage 2 --vae-of finetune/tiny_base    # half of them after the base's VAE
python examples/tiny_base/train_judge.py calibrate     # only the threshold, of the weights that are there
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from fast_norm import quicken
from judge import (
    ABOUT,
    HEADS,
    LOGO,
    NONE,
    WEIGHTS,
    Judge,
    distance,
    fingerprint,
    load_judge,
    look_at,
    new_judge,
    readings,
    threshold,
    to_pixels,
    tones_there,
)
from looks import clear_look, far, wild_look, wild_scene, world_scene
from safetensors.torch import save_file
from shapes import CLASSES, LOGOS
from torch import Tensor, nn
from world import Look, Scene, logo_place, mark_of, render

PICTURES = 30000
AS_DARK = 0.12  # of the luma, from 0 to 1
STRIPED = 0.3  # of the clear looks and their changes: two colours side by side are the hardest to read
Transform = Callable[[np.ndarray], np.ndarray]  # images uint8 [B, H, W, 3] -> the same


def changes(look: Look, rng: np.random.Generator) -> dict[str, Look]:
    """The look with one thing changed: what a judge must not take for it. `look` has a logo."""
    other = clear_look(rng, look.kind)
    while not (far(other.logo_colour, look.logo_colour) and far(other.body, look.body)):
        other = clear_look(rng, look.kind)
    kinds = [kind for kind in CLASSES if kind != look.kind]
    logos = [logo for logo in LOGOS if logo != look.logo]
    changed = {
        "logo removed": replace(look, logo=None),
        "logo exchanged": replace(look, logo=str(rng.choice(logos))),
        "logo recoloured": replace(look, logo_colour=other.logo_colour),
        "body recoloured": replace(look, body=other.body),
        "class changed": replace(look, kind=str(rng.choice(kinds))),
    }
    if look.second is not None:
        changed["tones swapped"] = replace(look, body=look.second, second=look.body)
        changed["second tone removed"] = replace(look, second=None)
    if look.pattern != "plain":
        changed["pattern removed"] = replace(look, pattern="plain")
    return changed


Labels = tuple[list[int], np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def sample(index: int) -> tuple[np.ndarray, *Labels]:
    """A render and its `labels`. Every other one is a wild look, half of those with clear details or with one of these
    changed."""
    rng = np.random.default_rng((4, index))
    scene = world_scene(rng)[0] if index % 2 else wild_scene(rng, _odd_look(rng))
    return np.asarray(render(scene)), *labels(scene)


def _odd_look(rng: np.random.Generator) -> Look:
    look = wild_look(rng)
    if rng.random() < 0.5:
        return look
    clear = clear_look(rng, look.kind)
    every = [clear, *changes(clear, rng).values()]
    chosen = replace(every[int(rng.integers(len(every)))], worn=look.worn)
    return replace(chosen, pattern="striped", second=None) if rng.random() < STRIPED else chosen


def labels(scene: Scene) -> Labels:
    """The words' numbers, the colours [4, 3], which of them are there [4], the logo's place [3], and the colours in
    the other order that is right too.

    Where two colours may change places, the darker one comes first: an order that the image decides leaves nothing to
    guess. Where both are about as dark, it does not decide, and either order is right."""
    look = scene.look
    words = {"kind": look.kind, "pattern": look.pattern, "place": scene.place}
    words |= {LOGO: look.logo or NONE, "worn": look.worn or NONE}
    numbers = [HEADS[name].index(words[name]) for name in HEADS]
    tones, *others = sorted(readings(look), key=_first_luma)
    alike = [other for other in others if _first_luma(other) - _first_luma(tones) < AS_DARK]
    there = np.array(tones_there(look), dtype=float)
    return numbers, tones, there, np.array(logo_place(scene)), alike[0] if alike else tones


def _first_luma(tones: np.ndarray) -> float:
    return float(tones[0] @ (0.3, 0.59, 0.11))


def augment(pixels: Tensor) -> Tensor:
    """Adds blur, noise and brightness changes, because generated images are softer than renders."""
    if torch.rand(()) < 0.7:
        pixels = _blur(pixels, 0.3 + 1.2 * float(torch.rand(())))
    if torch.rand(()) < 0.3:
        soft = F.interpolate(F.avg_pool2d(pixels, 2), scale_factor=2, mode="bilinear", align_corners=False)
        pixels = torch.lerp(pixels, soft, float(torch.rand(())))
    return pixels + torch.randn_like(pixels) * 0.08 * float(torch.rand(())) + 0.03 * torch.randn(len(pixels), 1, 1, 1)


def _blur(pixels: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of `sigma` pixels."""
    line = torch.exp(-(torch.arange(-3, 4) ** 2) / (2 * sigma**2))
    line = (line / line.sum()).repeat(3, 1)
    wide = F.pad(pixels, (3, 3, 3, 3), mode="replicate")
    across = F.conv2d(wide, line[:, None, None, :], groups=3)
    return F.conv2d(across, line[:, None, :, None], groups=3)


def _loss(judge: Judge, pixels: Tensor, truth: Sequence[Tensor]) -> Tensor:
    """Cross entropy of the words, and the distances of the colours that are there and of the logo's place.

    Half of the windows are where the logo is, give or take a little; the others where the judge sees it."""
    words, tones, there, place, swapped = truth
    with torch.autocast("cpu", torch.bfloat16):
        read = judge(augment(pixels), torch.where(torch.rand(len(place), 1) < 0.5, _aside(place), torch.nan))
    orders = [(read.tones.float() - each).square().sum(2).add(1e-4).sqrt() * there for each in (tones, swapped)]
    off = torch.minimum(*(each.sum(1) for each in orders))
    loss: Tensor = 8 * off.sum() / there.sum()
    loss = loss + 4 * (read.where.float() - place).abs().sum(1).mean()
    for k, name in enumerate(HEADS):
        loss = loss + F.cross_entropy(read.words[name].float(), words[:, k])
    return loss


def _aside(place: Tensor) -> Tensor:
    return place + torch.randn_like(place) * torch.tensor([0.03, 0.03, 0.01])


def _bank(first: int, base: Path | None) -> list[np.ndarray]:
    """Images and labels of PICTURES renders; with `base`, the second half of them after its VAE."""
    with ProcessPoolExecutor(2) as pool:
        rows = list(pool.map(sample, range(first, first + PICTURES), chunksize=200))
        pictures, *truth = [np.stack([row[k] for row in rows]) for k in range(len(rows[0]))]
        if base is not None:
            parts = np.array_split(pictures[PICTURES // 2 :], 50)
            after = list(pool.map(partial(_through, base), parts))
            pictures = np.concatenate([pictures[: PICTURES // 2], *after])
    return [pictures, *truth]


def _through(base: Path, pictures: np.ndarray) -> np.ndarray:
    torch.set_num_threads(1)
    return round_trip(AutoencoderKL.from_pretrained(base / "vae", dtype=torch.float32), pictures)


@torch.no_grad()
def round_trip(vae: AutoencoderKL, pictures: np.ndarray) -> np.ndarray:
    """Images [B, 128, 128, 3] in 8 bits after the VAE."""
    parts = to_pixels(list(pictures)).split(32)
    out = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1) for part in parts])
    return ((out + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def train(steps: int, stage: int = 0, base: Path | None = None, batch: int = 64) -> Judge:
    """Each stage has renders of its own. Stages after the first go on from the stored weights."""
    torch.manual_seed(stage)
    pictures, *truth = _bank(stage * PICTURES, base)
    judge = load_judge() if stage else new_judge()
    quicken(judge)
    judge.train().requires_grad_(True)
    rate = 1e-3 if stage else 2e-3
    optimizer = torch.optim.AdamW(judge.parameters(), lr=rate, weight_decay=0.02, fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        chosen = np.random.default_rng((8 + stage, step)).integers(0, PICTURES, batch)
        tensors = [torch.from_numpy(part[chosen]) for part in truth]
        numbers = [tensors[0], *(tensor.float() for tensor in tensors[1:])]
        loss = _loss(judge, to_pixels(list(pictures[chosen])), numbers)
        loss.backward()
        nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(step, round(float(loss.detach()), 3), flush=True)
    judge.eval()
    return judge


def as_is(pictures: np.ndarray) -> np.ndarray:
    return pictures


def word_rates(judge: Judge, shown: Transform = as_is, count: int = 1000) -> dict[str, float]:
    """The share of held-out renders whose words, and whose colours' words, are read right, after `shown`."""
    scenes = [world_scene(np.random.default_rng((14, k))) for k in range(count)]
    seen = look_at(judge, list(shown(np.stack([np.asarray(render(scene)) for scene, _ in scenes]))))
    right: dict[str, list[bool]] = {name: [] for name in (*HEADS, "colour", "second", "logo_colour")}
    for (scene, facts), one in zip(scenes, seen, strict=True):
        for k, name in enumerate(HEADS):
            right[name].append(HEADS[name].index(one.word(name)) == labels(scene)[0][k])
        if facts.name is None:
            right["colour"].append(one.colour("body") == facts.colour)
            right["second"].append(one.colour("second") == (facts.second or facts.colour))
            right["logo_colour"] += [one.colour("logo_colour") == facts.logo_colour] if facts.logo else []
    return {name: round(float(np.mean(values)), 4) for name, values in right.items()}


def counterfactuals(judge: Judge, seed: int, shown: Transform = as_is, count: int = 300) -> dict[str, list[float]]:
    """Distances of renders to clear looks that are no subject's: of the look itself ("true"), and of every change."""
    distances: dict[str, list[float]] = {"true": [], "true, striped": []}
    work: list[tuple[str, Look, np.ndarray]] = []
    for k in range(count):
        rng = np.random.default_rng((seed, k))
        look = clear_look(rng, CLASSES[k % len(CLASSES)])
        striped = replace(look, pattern="striped", second=None)
        for name, shown_look in {"true": look, **changes(look, rng)}.items():
            work.append((name, look, np.asarray(render(wild_scene(rng, shown_look)))))
        if far(look.body, mark_of(look)):
            work.append(("true, striped", striped, np.asarray(render(wild_scene(rng, striped)))))
    seen = look_at(judge, list(shown(np.stack([picture for _, _, picture in work]))))
    for (name, look, _), one in zip(work, seen, strict=True):
        distances.setdefault(name, []).append(distance(look, one))
    return distances


def calibrate(judge: Judge) -> float:
    """The threshold at which the true looks and the change that is hardest to see are told apart equally well."""
    distances = counterfactuals(judge, 15)
    same = [np.array(distances.pop(name)) for name in ("true", "true, striped")]
    changed, grid = [np.array(values) for values in distances.values()], np.linspace(0.5, 3.0, 251)
    worst = [min(*(float((d <= t).mean()) for d in same), *(float((d > t).mean()) for d in changed)) for t in grid]
    return round(float(grid[int(np.argmax(worst))]), 3)


def rates(judge: Judge, shown: Transform = as_is, count: int = 300) -> dict[str, float]:
    """The share judged right: true looks accepted, each change refused. Other looks than `calibrate` used."""
    limit, distances = threshold(), counterfactuals(judge, 16, shown, count)
    return {
        name: round(float(((np.array(values) <= limit) == name.startswith("true")).mean()), 4)
        for name, values in distances.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["train", "calibrate"], default="train")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--stage", type=int, default=0, help="1: goes on from the stored weights with other renders")
    parser.add_argument("--vae-of", type=Path, help="a base: half of the renders are shown after its VAE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.what == "train":
        trained = train(arguments.steps, arguments.stage, arguments.vae_of)
        save_file({name: value.half().contiguous() for name, value in trained.state_dict().items()}, WEIGHTS)
    loaded = load_judge()
    ABOUT.write_text(json.dumps({"fingerprint": fingerprint(), "threshold": calibrate(loaded)}, indent=2) + "\n")
    print(json.dumps(word_rates(loaded) | rates(loaded), indent=2))
