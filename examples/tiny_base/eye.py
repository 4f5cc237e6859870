"""The judge against the eye: 100 generated images, labelled by hand.

    python examples/tiny_base/eye.py pick --work /tmp/dreambooth-claims    # from the runs of dreambooth_claims.py
    python examples/tiny_base/eye.py pages --out build                     # sheets of 10 images beside their subject
    python examples/tiny_base/eye.py compare                               # the labels against the judge

`pick` writes eye.png (a grid of ten by ten images) and eye.jsonl (a line for each: its subject, and where it comes
from). Whoever labels looks at the sheets, where nothing says what the judge thinks, and adds "is": true to the lines
of the images that show the subject with every detail of its look, else false.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from judge import is_subject, load_judge
from looks import SUBJECTS, subject_picture
from PIL import Image, ImageDraw
from world import PIXELS

COUNT, ACROSS = 100, 10
GRID, LABELS = Path(__file__).with_name("eye.png"), Path(__file__).with_name("eye.jsonl")
SHEETS = ("own.png", "beach.png", "snow.png", "plain.png")  # of a run's folder drawn-1, six images wide
WIDE = 6
Row = dict[str, Any]


def pick(work: Path) -> None:
    """Chooses images by a fixed seed: the subjects in turn, then a run, a sheet of it and an image at random."""
    rng, page = np.random.default_rng(100), Image.new("RGB", (ACROSS * PIXELS, COUNT // ACROSS * PIXELS))
    rows: list[Row] = []
    for number in range(COUNT):
        subject = list(SUBJECTS)[number % len(SUBJECTS)]
        found = sorted(file.parent for file in work.glob("*/*/drawn-1/done.json"))
        runs = [folder for folder in found if folder.parent.name.rsplit("-", 2)[0] == subject]
        run, sheet = runs[rng.integers(len(runs))], SHEETS[rng.choice(len(SHEETS), p=(0.55, 0.15, 0.15, 0.15))]
        image = _tile(Image.open(run / sheet), WIDE, rng)
        page.paste(image, _corner(number, ACROSS))
        rows.append({"number": number, "subject": subject, "run": run.parent.name, "sheet": sheet})
    page.save(GRID, optimize=True)
    LABELS.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _tile(sheet: Image.Image, across: int, rng: np.random.Generator) -> Image.Image:
    side = sheet.width // across
    column, row = int(rng.integers(across)), int(rng.integers(sheet.height // side))
    return sheet.convert("RGB").crop((column * side, row * side, (column + 1) * side, (row + 1) * side))


def _corner(number: int, across: int) -> tuple[int, int]:
    return number % across * PIXELS, number // across * PIXELS


def images() -> list[Image.Image]:
    page = Image.open(GRID).convert("RGB")
    corners = [_corner(number, ACROSS) for number in range(COUNT)]
    return [page.crop((x, y, x + PIXELS, y + PIXELS)) for x, y in corners]


def labels() -> list[Row]:
    return [json.loads(line) for line in LABELS.read_text().splitlines()]


def pages(out: Path) -> None:
    """Sheets of ten images, each above a render of its subject; the numbers are those of eye.jsonl."""
    out.mkdir(parents=True, exist_ok=True)
    side, shown = 2 * PIXELS, images()
    for start in range(0, COUNT, 10):
        page = Image.new("RGB", (5 * side, 4 * side))
        for place, row in enumerate(labels()[start : start + 10]):
            x, y = place % 5 * side, place // 5 * 2 * side
            page.paste(shown[row["number"]].resize((side, side), Image.Resampling.LANCZOS), (x, y))
            page.paste(subject_picture(row["subject"], 900, "table", side), (x, y + side))
            at, number = (x + 4, y + 4), str(row["number"])
            ImageDraw.Draw(page).text(at, number, fill="black", stroke_width=2, stroke_fill="white")
        page.save(out / f"eye-{start:02d}.png")


def compare() -> dict[str, int]:
    """How often the eye and the judge agree that an image shows its subject."""
    judge, rows = load_judge(), labels()
    names = {(True, True): "both", (False, False): "neither", (True, False): "the eye alone"}
    found = dict.fromkeys([*names.values(), "the judge alone"], 0)
    for image, row in zip(images(), rows, strict=True):
        (seen,) = is_subject(judge, [image], SUBJECTS[row["subject"]])
        found[names.get((row["is"], seen), "the judge alone")] += 1
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["pick", "pages", "compare"])
    parser.add_argument("--work", type=Path, default=Path("/tmp/dreambooth-claims"))
    parser.add_argument("--out", type=Path, default=Path("build"))
    arguments = parser.parse_args()
    if arguments.what == "pick":
        pick(arguments.work)
    elif arguments.what == "pages":
        pages(arguments.out)
    else:
        print(json.dumps(compare(), indent=2))
