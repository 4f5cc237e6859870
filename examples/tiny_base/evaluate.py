"""Measures how well a tiny base draws 400 prompts with combinations that were not in the training data.

    python examples/tiny_base/evaluate.py finetune/tiny_base --json build/evaluation.json --grid build/grid.png

diffusers alone draws the images, and the classifier of judge.py, which was trained only on renders, rates them. Choose
guidance and steps with `--combinations training`, so that the reported prompts stay unseen.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from captions import PLACE_PHRASES, TEMPLATES
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline
from judge import HEADS, classify, load_judge, subject_rates, world_rates
from PIL import Image
from train_vae import HOLD_OUT, PICTURES, bank_picture, psnr, to_pixels
from world import Facts, held_out

AT_ONCE = 20
TARGETS = {"kind": 0.90, "colour": 0.85, "place": 0.95, "pattern": 0.75}


def prompts(count: int, unseen: bool = True) -> list[tuple[str, Facts]]:
    """Distinct prompts that state all four attributes, with held-out combinations or (`unseen` false) with others."""
    every = [Facts(*words) for words in itertools.product(*HEADS.values())]
    chosen = [(facts, form) for facts in every if held_out(facts) == unseen for form in TEMPLATES]
    order = np.random.default_rng(400).permutation(len(chosen))[:count]
    return [(_prompt(*chosen[k]), chosen[k][0]) for k in order]


def _prompt(facts: Facts, form: str) -> str:
    thing = f"{facts.colour} {facts.pattern} {facts.kind}"
    return f"{form.format(thing=thing)} {PLACE_PHRASES[facts.place]}"


def draw(folder: Path, texts: list[str], first_seed: int, steps: int, guidance: float) -> np.ndarray:
    """Draws images, uint8 [B, 64, 64, 3], with plain diffusers. An image's noise depends only on its own seed."""
    torch.set_num_threads(1)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(first_seed + k) for k in range(len(texts))]
    out = pipeline(texts, num_inference_steps=steps, guidance_scale=guidance, generator=seeds, output_type="np")
    return (out.images * 255).round().astype(np.uint8)


def draw_all(folder: Path, texts: list[str], processes: int, steps: int, guidance: float) -> np.ndarray:
    with ProcessPoolExecutor(processes) as pool:
        starts = range(0, len(texts), AT_ONCE)
        work = [pool.submit(draw, folder, texts[k : k + AT_ONCE], k, steps, guidance) for k in starts]
        return np.concatenate([part.result() for part in work])


def obedience(pictures: np.ndarray, asked: list[Facts]) -> dict[str, float]:
    """The share of images that show what the prompt states, for each attribute and for all four together."""
    seen = classify(load_judge(), list(pictures))
    right = {name: np.array([getattr(facts, name) for facts in asked]) == np.array(seen[name]) for name in HEADS}
    shares = {name: float(values.mean()) for name, values in right.items()}
    return shares | {"all four": float(np.all(list(right.values()), axis=0).mean())}


@torch.no_grad()
def round_trip(vae: AutoencoderKL, pictures: np.ndarray) -> np.ndarray:
    """Images uint8 [B, H, W, 3] after encoding and decoding with the VAE."""
    parts = [to_pixels(pictures[k : k + 64]) for k in range(0, len(pictures), 64)]
    out = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1) for part in parts])
    return ((out + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def vae_figures(folder: Path) -> dict[str, float]:
    """PSNR in dB on held-out images, for captioned and for wild ones."""
    vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32)
    held = np.stack([np.asarray(bank_picture(k)) for k in range(PICTURES, PICTURES + HOLD_OUT)])
    return {"all": psnr(vae, held), "wild": psnr(vae, held[0::2]), "world": psnr(vae, held[1::2])}


def judge_figures(folder: Path) -> dict[str, dict[str, float]]:
    """The judge's accuracy on held-out renders, unchanged and after encoding and decoding with the VAE."""
    judge = load_judge()
    vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32)
    return {
        "renders": world_rates(judge) | subject_rates(judge),
        "after the VAE": world_rates(judge, lambda pictures: round_trip(vae, pictures))
        | subject_rates(judge, lambda pictures: round_trip(vae, pictures)),
    }


def sheet(pictures: np.ndarray, asked: list[Facts], columns: int = 8, zoom: int = 2) -> Image.Image:
    """The first images of each class without selection, one row for each class."""
    step = 64 * zoom
    page = Image.new("RGB", (columns * step, len(HEADS["kind"]) * step))
    for row, kind in enumerate(HEADS["kind"]):
        own = [k for k, facts in enumerate(asked) if facts.kind == kind][:columns]
        for column, k in enumerate(own):
            picture = Image.fromarray(pictures[k]).resize((step, step), Image.Resampling.BICUBIC)
            page.paste(picture, (column * step, row * step))
    return page


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    asked = prompts(arguments.prompts, unseen=arguments.combinations == "held-out")
    began = time.perf_counter()
    texts = [text for text, _ in asked]
    pictures = draw_all(arguments.folder, texts, arguments.processes, arguments.steps, arguments.guidance)
    facts = [fact for _, fact in asked]
    figures: dict[str, object] = {
        "prompts": len(asked),
        "combinations": arguments.combinations,
        "guidance": arguments.guidance,
        "sampler": f"DPM++ 2M, {arguments.steps} steps, guidance {arguments.guidance}",
        "drawn as asked": obedience(pictures, facts),
        "targets": TARGETS,
        "seconds": round(time.perf_counter() - began, 1),
    }
    if arguments.combinations == "held-out":
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
    parser.add_argument("--processes", type=int, default=4)
    main(parser.parse_args())
