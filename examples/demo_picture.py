"""Makes the README's image from a run of `finetune demo`: python examples/demo_picture.py RUN docs/demo.png"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from finetune.jobs.demo import demo_images

SIDE, GAP, LABEL, COUNT = 96, 4, 190, 4


def row(files: list[Path]) -> Image.Image:
    """Places images side by side, each SIDE x SIDE pixels."""
    strip = Image.new("RGB", (len(files) * (SIDE + GAP), SIDE), "white")
    for number, file in enumerate(files):
        image = Image.open(file).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        strip.paste(image, (number * (SIDE + GAP), 0))
    return strip


def compose(run: Path) -> Image.Image:
    """Left: the photos. Right: a row for each prompt, before and after training with the same seeds."""
    prompts = json.loads((run / "run.json").read_text())["prompts"]
    given = row(sorted(demo_images().glob("*.png")))
    half = COUNT * (SIDE + GAP)
    left = SIDE + 4 * GAP
    image = Image.new("RGB", (left + LABEL + 2 * half + 4 * GAP, 24 + 5 * (SIDE + GAP)), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    for number in range(5):
        tile = given.crop((number * (SIDE + GAP), 0, number * (SIDE + GAP) + SIDE, SIDE))
        image.paste(tile, (0, 24 + number * (SIDE + GAP)))
    draw.text((0, 2), "given", fill="black", font=font)
    for column, name in enumerate(("before", "after")):
        draw.text((left + LABEL + column * (half + 3 * GAP), 2), name, fill="black", font=font)
    for number, prompt in enumerate(prompts):
        top = 24 + SIDE // 2 + number * (SIDE + GAP)
        draw.text((left, top + SIDE // 2 - 8), prompt.removeprefix("a photo of "), fill="black", font=font)
        for column, name in enumerate(("before", "after")):
            files = [run / "samples" / name / f"{number:02d}-{seed}.png" for seed in range(COUNT)]
            image.paste(row(files), (left + LABEL + column * (half + 3 * GAP), top))
    return image


if __name__ == "__main__":
    compose(Path(sys.argv[1])).save(sys.argv[2], optimize=True)
