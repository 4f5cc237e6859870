"""Assembles the tiny base as an ordinary diffusers folder in fp16, and loads it with diffusers alone as a check.

    python examples/tiny_base/assemble.py --out build --to finetune/tiny_base

It combines build/base with the averaged weights from the denoiser's newest checkpoint. The text encoder's names have
the `text_model.` prefix, which every version of transformers reads.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from captions import caption
from diffusers import StableDiffusionPipeline
from looks import training_facts
from safetensors.torch import load_file, save_file
from torch import Tensor

LIMIT = 40_000_000  # bytes
WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
COPIED = (
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
)


def newest_checkpoint(folder: Path) -> Path:
    """The newest complete checkpoint of the denoiser's training in a folder."""
    complete = sorted(file.parent for file in folder.glob("checkpoints/step-*/state.json"))
    if not complete:
        raise SystemExit(f"there is no checkpoint of the denoiser in {folder}: run train_denoiser.py first")
    return complete[-1]


def denoiser_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The exponential moving average of the UNet's weights, under diffusers' names."""
    averaged = load_file(checkpoint / "ema.safetensors")
    return {name.removeprefix("denoiser."): value for name, value in averaged.items()}


def with_prefix(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"text_model.{name.removeprefix('text_model.')}": value for name, value in weights.items()}


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def assemble(out: Path, to: Path) -> int:
    """Writes the folder. Returns the denoiser's number of training steps."""
    base, checkpoint = out / "base", newest_checkpoint(out / "denoiser")
    weights = {part: load_file(base / part / file) for part, file in WEIGHTS.items() if part != "unet"}
    weights["unet"] = denoiser_weights(checkpoint)
    weights["text_encoder"] = with_prefix(weights["text_encoder"])
    for part, file in WEIGHTS.items():
        config = json.loads((base / part / "config.json").read_text())
        config.pop("_name_or_path", None)  # a path of the machine that trained it
        write_json(to / part / "config.json", config | ({"dtype": "float16"} if "dtype" in config else {}))
        halves = {name: value.half().contiguous() for name, value in weights[part].items()}
        assert all(value.isfinite().all() for value in halves.values()), f"{part} overflows fp16"
        save_file(halves, to / part / file, metadata={"format": "pt"})
        (to / part / file).chmod(0o644)  # safetensors writes files that only their owner can read
    for name in COPIED:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(base / name, to / name)
    about = "# What the tiny base draws for prior.others: captions of its own world. One prompt a line."
    (to / "neutral_prompts.txt").write_text("\n".join([about, *neutral_prompts()]) + "\n")
    index = json.loads((base / "model_index.json").read_text())
    write_json(to / "model_index.json", {name: value for name, value in index.items() if name != "_name_or_path"})
    return int(json.loads((checkpoint / "state.json").read_text())["step"])


def neutral_prompts(count: int = 320) -> list[str]:
    """Different captions of the world, without named things: what `prior.others` draws with this base."""
    rng, found = np.random.default_rng(320), dict[str, None]()
    while len(found) < count:
        found[caption(training_facts(rng), rng, empty=0.0)[0]] = None
    return list(found)


def check(out: Path, to: Path) -> None:
    """Checks that the folder is small, loads with diffusers alone, holds the trained weights, and draws an image."""
    size = sum(file.stat().st_size for file in to.rglob("*") if file.is_file())
    assert size <= LIMIT, f"{to} has {size:,} bytes, more than {LIMIT:,}"
    pipeline = StableDiffusionPipeline.from_pretrained(to, dtype=torch.float32)
    trained = denoiser_weights(newest_checkpoint(out / "denoiser"))
    for name, value in pipeline.unet.state_dict().items():
        torch.testing.assert_close(value, trained[name].half().float(), rtol=0, atol=0)
    kept = with_prefix(load_file(out / "base/text_encoder" / WEIGHTS["text_encoder"]))
    for name, value in with_prefix(pipeline.text_encoder.state_dict()).items():
        if "position_ids" not in name:
            torch.testing.assert_close(value, kept[name].half().float(), rtol=0, atol=0)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    drawn = pipeline(
        "a photo of a red mug on the beach", num_inference_steps=20, guidance_scale=3, generator=generator
    )
    (out / "checked.png").unlink(missing_ok=True)
    drawn.images[0].save(out / "checked.png")
    print(f"{to}: {size:,} bytes; loaded by {type(pipeline).__name__}; an image is in {out / 'checked.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build"))
    parser.add_argument("--to", type=Path, default=Path("finetune/tiny_base"))
    arguments = parser.parse_args()
    print("denoiser step", assemble(arguments.out, arguments.to))
    check(arguments.out, arguments.to)
