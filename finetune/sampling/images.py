"""Arranges images in grids, and saves them as PNG files with their settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, PngImagePlugin

from finetune.core.files import public_name, replacing
from finetune.sampling.settings import Sampling

A1111_SAMPLERS = {"dpm++": "DPM++ 2M", "ddim": "DDIM", "euler": "Euler", "unipc": "UniPC"}


def grid(images: Sequence[Image.Image], columns: int, captions: Sequence[str] | None = None) -> Image.Image:
    """Arranges images in rows of `columns`, with the row's caption, if any, above it."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    head = 16 if captions else 0
    page = Image.new("RGB", (columns * width, rows * (height + head)), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        page.paste(image, (column * width, row * (height + head) + head))
    for row, caption in enumerate(captions or []):
        ImageDraw.Draw(page).text((3, row * (height + head) + 2), caption, fill="black")
    return page


def parameters(
    prompt: str, seed: int, sampling: Sampling, model: str, inputs: Mapping[str, str | float] | None = None
) -> str:
    """The `parameters` text that A1111, Forge and ComfyUI's readers show, in A1111's layout and sampler names.

    `inputs`: what else the image was drawn from, label -> value.
    """
    size = f"{sampling.size}x{sampling.size}" if sampling.size else None
    given = {
        "Steps": sampling.steps,
        "Sampler": A1111_SAMPLERS.get(sampling.sampler or "", sampling.sampler),
        "CFG scale": sampling.guidance,
        "Seed": seed,
        "Size": size,
        **(inputs or {}),
    }
    settings = ", ".join(f"{key}: {value}" for key, value in given.items() if value is not None)
    middle = f"\nNegative prompt: {sampling.negative}" if sampling.negative else ""
    model = public_name(model)  # images get shared: no private paths
    name = json.dumps(model, ensure_ascii=False) if "," in model or ":" in model else model
    return f"{prompt}{middle}\n{settings}, Model: {name}"


def save_image(image: Image.Image, path: Path, text: str) -> None:
    """Saves a PNG with the settings in its `parameters` text chunk."""
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", text)
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)
