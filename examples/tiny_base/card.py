"""Writes the tiny base's model card from card.md and the measured values.

    python examples/tiny_base/card.py --out build --to finetune/tiny_base

Reads build/{vae.json, vae_log.jsonl, text.json, evaluation.json, grid.png} and the denoiser's metrics.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from assemble import newest_checkpoint
from judge import threshold
from looks import NAMES
from safetensors import safe_open
from train_denoiser import BATCH
from train_denoiser import PICTURES as CAPTIONED
from train_vae import PICTURES as RECONSTRUCTED

TEMPLATE = Path(__file__).with_name("card.md")
VERSION_1 = "1d01692"  # the commit with the tiny base of 64 pixels, its card and its programs
LABELS = {"kind": "class", "second": "second tone", "logo_colour": "colour of the logo", "worn": "what is worn"}


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def count(file: Path) -> int:
    with safe_open(file, "pt") as weights:
        return sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118 (no iterator)


def attribute_rows(measured: dict[str, Any]) -> str:
    judge = measured["judge"]
    return "\n".join(
        f"| {LABELS.get(name, name)} | {measured['drawn as asked'][name]:.1%} | {wanted:.0%} "
        f"| {judge['renders'][name]:.1%} | {judge['after the VAE'][name]:.1%} |"
        for name, wanted in measured["targets"].items()
    )


def change_rows(measured: dict[str, Any]) -> str:
    """The judge's rates for the look itself and for every change of it; the others are words."""
    renders, after = measured["judge"]["renders"], measured["judge"]["after the VAE"]
    names = [name for name in renders if name == "true" or " " in name]
    accepted = {"true": "the look itself, accepted", "true, striped": "the same with stripes, accepted"}
    return "\n".join(
        f"| {accepted.get(name, f'{name}, refused')} | {renders[name]:.1%} | {after[name]:.1%} |" for name in names
    )


def stages(out: Path) -> list[tuple[int, float]]:
    """Steps and minutes of each stage of the denoiser's training, in their order."""
    folders = (*sorted(out.glob("denoiser_[0-9]")), out / "denoiser")
    metrics = [lines(folder / "metrics.jsonl") for folder in folders]
    steps = [read(newest_checkpoint(folder) / "state.json")["step"] for folder in folders]
    return [(count, minutes_of(own)) for count, own in zip(steps, metrics, strict=True)]


def minutes_of(metrics: list[dict[str, Any]]) -> float:
    """The wall time of the training in minutes, from the logged steps."""
    return float(sum(line["seconds"] for line in metrics) / len(metrics) * metrics[-1]["step"] / 60)


def card(out: Path, to: Path) -> str:
    measured, vae_log = read(out / "evaluation.json"), lines(out / "vae_log.jsonl")
    assert measured["combinations"] == "held-out", "the card is about unseen combinations"
    trained = stages(out)
    psnr = measured["vae psnr"]
    return TEMPLATE.read_text().format(
        megabytes=sum(file.stat().st_size for file in to.rglob("*") if file.suffix != ".md") / 1e6,
        prompts=measured["prompts"],
        sampler=measured["sampler"],
        guidance=measured["guidance"],
        rows=attribute_rows(measured),
        changes=change_rows(measured),
        threshold=threshold(),
        details=measured["drawn as asked"]["details"],
        all_four=measured["drawn as asked"]["all four"],
        everything=measured["drawn as asked"]["everything"],
        named=measured["named things"]["is the named thing"],
        named_place=measured["named things"]["place"],
        names=len(NAMES),
        first=VERSION_1,
        hold_out=measured["vae pictures"],
        psnr=psnr["all"],
        world=psnr["world"],
        wild=psnr["wild"],
        text=min(read(out / "text.json")["right"].values()),
        vae_parameters=count(to / "vae/diffusion_pytorch_model.safetensors"),
        text_parameters=count(to / "text_encoder/model.safetensors"),
        unet_parameters=count(to / "unet/diffusion_pytorch_model.safetensors"),
        reconstructed=RECONSTRUCTED,
        captioned=CAPTIONED,
        batch=BATCH,
        vae_steps=vae_log[-1]["step"],
        vae_minutes=vae_log[-1]["minutes"],
        text_steps=read(out / "text.json")["steps"],
        unet_steps=" + ".join(f"{steps:,}" for steps, _ in trained),
        unet_minutes=sum(minutes for _, minutes in trained),
        length=read(to / "text_encoder/config.json")["max_position_embeddings"],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build"))
    parser.add_argument("--to", type=Path, default=Path("finetune/tiny_base"))
    arguments = parser.parse_args()
    shutil.copy(arguments.out / "grid.png", arguments.to / "grid.png")
    (arguments.to / "README.md").write_text(card(arguments.out, arguments.to))
