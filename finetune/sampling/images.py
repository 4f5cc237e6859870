"""Images as grids and as PNG files that say how they were made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, PngImagePlugin

from finetune.core.files import public_name, replacing

A1111_SAMPLERS = {"dpm++": "DPM++ 2M", "ddim": "DDIM", "euler": "Euler", "unipc": "UniPC"}


def grid(images: Sequence[Image.Image], columns: int, captions: Sequence[str] | None = None) -> Image.Image:
    """Pictures in rows of `columns`; each row's caption, where given, stands above it."""
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
    prompt: str, negative: str, seed: int, sampler: str, steps: int, guidance: float, size: int, model: str
) -> str:
    """The `parameters` text that A1111, Forge and ComfyUI's readers show, in A1111's layout and sampler names."""
    label = A1111_SAMPLERS.get(sampler, sampler)
    settings = f"Steps: {steps}, Sampler: {label}, CFG scale: {guidance}, Seed: {seed}, Size: {size}x{size}"
    middle = f"\nNegative prompt: {negative}" if negative else ""
    model = public_name(model)  # pictures are passed on
    name = json.dumps(model, ensure_ascii=False) if "," in model or ":" in model else model
    return f"{prompt}{middle}\n{settings}, Model: {name}"


def save_image(image: Image.Image, path: Path, text: str) -> None:
    """A PNG that carries how it was made, in the `parameters` text chunk."""
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", text)
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)
