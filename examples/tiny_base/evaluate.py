"""Measures how well a tiny base draws 400 prompts with combinations that were not in the training data.

    python examples/tiny_base/evaluate.py finetune/tiny_base --json build/evaluation.json --grid build/grid.png

diffusers alone draws the images, and the judge, which was trained only on renders, reads them. Two parts: things with
every detail that words can say, and named things in two places each. Choose guidance and steps with `--combinations
training`, so that the reported prompts stay unseen.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from captions import full_caption
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from judge import HEADS, NONE, Seen, load_judge, look_at, threshold
from judge import distance as distance_to
from looks import NAMED, NAMES, Facts, held_out, random_facts
from PIL import Image
from places import PLACES
from shapes import CLASSES
from train_judge import rates, round_trip, word_rates
from train_vae import HOLD_OUT, PICTURES, bank_picture, psnr
from world import PIXELS

AT_ONCE = 20
TARGETS = {
    "kind": 0.90,
    "colour": 0.85,
    "place": 0.95,
    "pattern": 0.75,
    "second": 0.85,
    "logo": 0.85,
    "logo_colour": 0.85,
    "worn": 0.85,
}


def unseen_facts(count: int, unseen: bool = True) -> list[Facts]:
    """Facts of different things, with held-out combinations or (`unseen` false) with others."""
    rng, found = np.random.default_rng(400), dict[Facts, None]()
    while len(found) < count:
        facts = random_facts(rng)
        if held_out(facts) == unseen:
            found[facts] = None
    return list(found)


def named_things() -> list[Facts]:
    """Every named thing in two places."""
    return [
        Facts(NAMED[name].kind, "", "", PLACES[(k + turn) % len(PLACES)], name=name)
        for turn in (0, 3)
        for k, name in enumerate(NAMES)
    ]


def draw(folder: Path, texts: list[str], first_seed: int, steps: int, guidance: float) -> np.ndarray:
    """Draws images, uint8 [B, H, W, 3], with plain diffusers. An image's noise depends only on its own seed."""
    torch.set_num_threads(1)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(first_seed + k) for k in range(len(texts))]
    out = pipeline(texts, num_inference_steps=steps, guidance_scale=guidance, generator=seeds, output_type="np")
    images: np.ndarray = (out.images * 255).round().astype(np.uint8)
    return images


def draw_all(folder: Path, texts: list[str], processes: int, steps: int, guidance: float) -> np.ndarray:
    with ProcessPoolExecutor(processes) as pool:
        starts = range(0, len(texts), AT_ONCE)
        work = [pool.submit(draw, folder, texts[k : k + AT_ONCE], k, steps, guidance) for k in starts]
        return np.concatenate([part.result() for part in work])


def right(facts: Facts, seen: Seen) -> dict[str, bool]:
    """Which of the attributes that the facts state are drawn; what is not stated must not be there."""
    found = {name: seen.word(name) == (getattr(facts, name) or NONE) for name in HEADS}
    found["colour"] = seen.colour("body") == facts.colour
    found["second"] = seen.colour("second") == (facts.second or facts.colour)
    if facts.logo:
        found["logo_colour"] = seen.colour("logo_colour") == facts.logo_colour
    return found


def obedience(pictures: np.ndarray, asked: list[Facts]) -> dict[str, float]:
    """The share of images that show what the prompt states: each attribute where it is stated, details together
    (second tone, logo, its colour, what is worn), the four of version 1 together, and everything together."""
    found = [right(facts, seen) for facts, seen in zip(asked, look_at(load_judge(), list(pictures)), strict=True)]
    pairs = list(zip(asked, found, strict=True))
    stated = {name: [one[name] for facts, one in pairs if getattr(facts, name)] for name in TARGETS}
    shares = {name: _share(values) for name, values in stated.items()}
    details = [name for name in ("second", "logo", "logo_colour", "worn") if stated[name]]
    shares["details"] = _share([value for name in details for value in stated[name]])
    shares["all four"] = _share([all(one[name] for name in ("kind", "colour", "pattern", "place")) for one in found])
    return shares | {"everything": _share([all(one.values()) for one in found])}


def _share(values: list[bool]) -> float:
    return float(np.mean(values)) if values else float("nan")


def named_obedience(pictures: np.ndarray, asked: list[Facts]) -> dict[str, float]:
    """The share of images of named things that show the thing with all its details, and its place."""
    seen = look_at(load_judge(), list(pictures))
    looks = [replace(NAMED[str(facts.name)], worn=None) for facts in asked]
    limit = threshold()
    return {
        "is the named thing": _share([distance_to(look, one) <= limit for look, one in zip(looks, seen, strict=True)]),
        "kind": _share([one.word("kind") == facts.kind for facts, one in zip(asked, seen, strict=True)]),
        "place": _share([one.word("place") == facts.place for facts, one in zip(asked, seen, strict=True)]),
    }


def vae_figures(folder: Path) -> dict[str, float]:
    """PSNR in dB on held-out images, for captioned and for wild ones."""
    vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32)
    held = np.stack([np.asarray(bank_picture(k)) for k in range(PICTURES, PICTURES + HOLD_OUT)])
    return {"all": psnr(vae, held), "wild": psnr(vae, held[0::2]), "world": psnr(vae, held[1::2])}


def judge_figures(folder: Path) -> dict[str, dict[str, float]]:
    """How often the judge is right on held-out renders, unchanged and after encoding and decoding with the VAE."""
    judge = load_judge()
    vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32)

    def after_vae(pictures: np.ndarray) -> np.ndarray:
        return round_trip(vae, pictures)

    def both(shown: Callable[[np.ndarray], np.ndarray]) -> dict[str, float]:
        return word_rates(judge, shown) | rates(judge, shown)

    return {"renders": both(lambda pictures: pictures), "after the VAE": both(after_vae)}


def sheet(pictures: np.ndarray, asked: list[Facts], columns: int = 8) -> Image.Image:
    """The first images of each class without selection, one row for each class."""
    page = Image.new("RGB", (columns * PIXELS, len(CLASSES) * PIXELS))
    for row, kind in enumerate(CLASSES):
        own = [k for k, facts in enumerate(asked) if facts.kind == kind][:columns]
        for column, k in enumerate(own):
            page.paste(Image.fromarray(pictures[k]), (column * PIXELS, row * PIXELS))
    return page


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    facts = unseen_facts(arguments.prompts, unseen=arguments.combinations == "held-out")
    named = named_things() if arguments.combinations == "held-out" else []
    texts = [full_caption(one) for one in [*facts, *named]]
    began = time.perf_counter()
    pictures = draw_all(arguments.folder, texts, arguments.processes, arguments.steps, arguments.guidance)
    figures: dict[str, object] = {
        "prompts": len(facts),
        "combinations": arguments.combinations,
        "guidance": arguments.guidance,
        "sampler": f"DPM++ 2M, {arguments.steps} steps, guidance {arguments.guidance}",
        "drawn as asked": obedience(pictures[: len(facts)], facts),
        "targets": TARGETS,
        "seconds": round(time.perf_counter() - began, 1),
    }
    if named:
        figures |= {"named things": named_obedience(pictures[len(facts) :], named)}
        figures |= {"vae psnr": vae_figures(arguments.folder), "vae pictures": HOLD_OUT}
        figures |= {"judge": judge_figures(arguments.folder)}
    print(json.dumps(figures, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    if arguments.grid:
        sheet(pictures, facts).save(arguments.grid)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--grid", type=Path)
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--combinations", choices=["held-out", "training"], default="held-out")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--processes", type=int, default=2)
    main(parser.parse_args())
