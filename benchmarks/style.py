"""A style on the tiny base: is it learned, does a plain prompt stay plain, and does the image still obey the prompt?

    python benchmarks/style.py                                    # every style and prior; then docs/results.md
    python benchmarks/style.py run.steps=100 --styles "blue lines" --priors none      # a trial

Each run trains the recipe `style-lora` on 40 drawings (style_drawings.py) with TINY, which this base needs, and draws
the same scenes with and without the style's words, at the same seeds. Rows are added to style.jsonl beside this file;
finished ones are not repeated. A row names its base and its judge; rows of others (and those of version 1 of the base,
which name none) are not shown. Overrides are a trial: they have rows of their own, and the page is not written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from PIL import Image
from style_drawings import DEVELOPMENT, NEVER_SHOWN, SHOWN, STYLES, caption_of, drawing, facts_of, write_drawings

from finetune import load_recipe, train
from finetune.core.logging import quiet
from finetune.families.digests import base_hash
from finetune.families.source import load_family, resolve_base
from finetune.jobs.open import open_result
from finetune.report.style_distance import share_of_style
from finetune.sampling.draw import draw
from finetune.sampling.images import grid
from finetune.sampling.settings import Sampling

import judge  # isort: skip - examples/tiny_base, which style_drawings.py has put on the path
from evaluate import right as drawn_right  # isort: skip
from world import PIXELS  # isort: skip

ROOT = Path(__file__).parents[1]
PRIORS = ("none", "class_images", "frozen_base")
KINDS = (*SHOWN, *NEVER_SHOWN)
PICTURED = "blue lines"
EACH = 4  # scenes of each kind of thing
SAMPLING = Sampling(steps=12, guidance=3.0)
# the tiny base is small: it needs a larger rate and more modules than the recipe's, as `demo` has them
TINY = (
    "base=tiny", "method.targets=conv", "method.rank=16", "optim.lr=2e-3", "objective.weighting=min_snr",
    "run.steps=900", "sample.guidance=3.0", "sample.steps=12", "sample.count=1", "export.verify=off",
    "sample.prompts=['a house in {token} style', 'a house']",
)  # fmt: skip

Pictures = list[Image.Image]
Row = dict[str, Any]


def scenes() -> list[tuple[str, str, int]]:
    """(kind, caption, number) of every scene; none is among the drawings."""
    return [(kind, caption_of(facts_of(kind, n)), n) for kind in KINDS for n in range(500, 500 + EACH)]


def drawn(family: Any, words: str) -> Pictures:
    """Every scene with these words after its caption, each with the seed of its number."""
    prompts = [f"{caption} {words}".strip() for _, caption, _ in scenes()]
    return draw(family, prompts, SAMPLING, seeds=list(range(len(prompts))))


@cache
def of_base(work: Path, first_seed: int = 0) -> Pictures:
    """Every scene as the untrained base draws it; kept under `work`."""
    seeds = list(range(first_seed, first_seed + len(scenes())))
    files = [work / "base" / f"{seed}.png" for seed in seeds]
    if not all(file.is_file() for file in files):
        files[0].parent.mkdir(parents=True, exist_ok=True)
        images = draw(load_family("tiny"), [caption for _, caption, _ in scenes()], SAMPLING, seeds=seeds)
        for image, file in zip(images, files, strict=True):
            image.save(file)
    return [Image.open(file).convert("RGB") for file in files]


def of_artist(style: str, first: int = 0) -> Pictures:
    """Every scene as a drawing; `first` chooses other poses."""
    return [drawing(style, facts_of(kind, n), n + first) for kind, _, n in scenes()]


def right(pictures: Pictures, keys: Sequence[str] = ("kind", "colour", "place")) -> float:
    """The share of images in which the judge sees all that the caption says."""
    seen = judge.look_at(judge.load_judge(), pictures)
    wanted = [facts_of(kind, n) for kind, _, n in scenes()]
    found = [drawn_right(facts, one) for facts, one in zip(wanted, seen, strict=True)]
    return sum(all(one[key] for key in keys) for one in found) / len(found)


def measure(with_style: Pictures, without: Pictures, plain: Pictures, style: str) -> Row:
    """The figures of a run. All shares of the style are from the base's `plain` images (0) to the drawings (1)."""
    drawings = of_artist(style)
    new = slice(EACH * len(SHOWN), None)  # the scenes with things that no drawing shows
    return {
        "style": share_of_style(with_style, plain, drawings),
        "style_new": share_of_style(with_style[new], plain[new], drawings[new]),
        "plain": share_of_style(without, plain, drawings),
        "moved": 1 - share_of_style(without, drawings, plain),
        "right": right(without),
        "kind": right(with_style, ("kind",)),
    }


def one_run(work: Path, style: str, prior: str, overrides: Sequence[str]) -> Row:
    """Trains one combination and measures it."""
    tag = f"-{hashlib.sha256(' '.join(overrides).encode()).hexdigest()[:6]}" if overrides else ""
    folder = work / f"{style.replace(' ', '-')}-{prior}{tag}"
    photos = write_drawings(style, work / "drawings" / style.replace(" ", "-"))
    began = time.process_time()
    own = {
        "class_images": ("prior.guidance=3.0", "prior.count=40", "prior.steps=12"),
        "frozen_base": ("prior.prompt='{caption}'",),
    }.get(prior, ())
    settings = [f"data.photos={photos}", *TINY, f"prior.kind={prior}", *own, *overrides]
    run = train(load_recipe("style-lora", settings), folder)
    seconds = time.process_time() - began
    family, info = open_result(run)
    with_style, without = drawn(family, f"in {info.token} style"), drawn(family, "")
    drawings = [each.resize((PIXELS, PIXELS), Image.Resampling.BOX) for each in of_artist(style)]
    page = [*of_base(work), *without, *with_style, *drawings]
    grid(page, len(scenes())).save(folder / "looked.png")
    about = {"name": style, "prior": prior, "overrides": list(overrides)}
    return about | measure(with_style, without, of_base(work), style) | {"cpu_seconds": seconds}


def bounds(work: Path, style: str) -> Row:
    """What the same measures say of other drawings in the style, and of the base at other seeds."""
    found = measure(of_artist(style, 7000), of_base(work, 1000), of_base(work), style)
    return {"name": style, "prior": "bounds", "overrides": [], **found, "cpu_seconds": 0.0}


@cache
def stamp() -> dict[str, str]:
    """The base and the judge that a row belongs to."""
    return {"base": base_hash(resolve_base("tiny")), "judge": judge.fingerprint()}


def read_rows(file: Path) -> list[Row]:
    """The rows of this base and this judge."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [row for row in map(json.loads, lines) if stamp().items() <= row.items()]


def table(rows: Sequence[Row]) -> str:
    """A Markdown table, development styles first."""
    heads = ("style", "used for", "prior", "“… in T style” has the style", "the same of things never drawn",
             "“…” has the style", "“…” moved from the base", "“…” is right", "kind right in the style")  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    order = {name: number for number, name in enumerate(("bounds", *PRIORS))}
    for row in sorted(rows, key=lambda row: (list(STYLES).index(row["name"]), order[row["prior"]])):
        used = "development" if row["name"] in DEVELOPMENT else "held out"
        prior = "*other drawings, base at other seeds*" if row["prior"] == "bounds" else row["prior"].replace("_", " ")
        cells = [f"{row[key]:.2f}" for key in ("style", "style_new", "plain", "moved", "right", "kind")]
        lines.append(f"| {row['name']} | {used} | {prior} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(work: Path, style: str) -> None:
    """Writes docs/style.png. A column is a scene, one of each kind. The rows: the base; the plain prompt trained
    without a prior; the same with class images; the prompt with the style's words; a drawing of that scene."""
    none, kept = (Image.open(work / f"{style.replace(' ', '-')}-{prior}" / "looked.png") for prior in PRIORS[:2])
    rows = [(none, 0), (none, 1), (kept, 1), (kept, 2), (kept, 3)]  # in the order of the grids of `one_run`
    side = PIXELS
    page = Image.new("RGB", (side * len(KINDS), side * len(rows)))
    for (source, line), row in zip(rows, range(len(rows)), strict=True):
        for column in range(len(KINDS)):
            left, top = (column * EACH + 1) * side, line * side
            page.paste(source.crop((left, top, left + side, top + side)), (column * side, row * side))
    page.save(ROOT / "docs" / "style.png")


def write_results(text: str) -> None:
    """Replaces the text between the markers in docs/results.md."""
    file = ROOT / "docs" / "results.md"
    before, _, rest = file.read_text(encoding="utf-8").partition("<!-- style -->")
    _, _, after = rest.partition("<!-- end of style -->")
    file.write_text(f"{before}<!-- style -->\n{text}\n<!-- end of style -->{after}", encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="section.key=value: a trial")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "style")
    parser.add_argument("--rows", type=Path, default=Path(__file__).with_name("style.jsonl"), help="the results' file")
    parser.add_argument("--styles", nargs="+", default=list(STYLES), choices=list(STYLES))
    parser.add_argument("--priors", nargs="+", default=PRIORS, choices=PRIORS)
    parser.add_argument("--write", action="store_true", help="write docs/results.md from the rows that are there")
    arguments = parser.parse_args()
    work, file = arguments.work.absolute(), arguments.rows.absolute()
    work.mkdir(parents=True, exist_ok=True)
    quiet()
    torch.set_num_threads(1)
    for style, prior in () if arguments.write else product(arguments.styles, ("bounds", *arguments.priors)):
        overrides = [] if prior == "bounds" else arguments.overrides
        done = [(row["name"], row["prior"], row["overrides"]) for row in read_rows(file)]
        if (style, prior, overrides) in done:
            continue
        row = bounds(work, style) if prior == "bounds" else one_run(work, style, prior, overrides)
        with file.open("a", encoding="utf-8", newline="\n") as out:
            out.write(json.dumps(row | stamp()) + "\n")
        print({key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    wanted = [row for row in read_rows(file) if row["overrides"] in ([], arguments.overrides)]
    trained = {row["name"] for row in wanted if row["prior"] != "bounds"}
    wanted = [row for row in wanted if row["name"] in trained]
    print(table(wanted))
    if arguments.write:
        write_results(table([row for row in wanted if not row["overrides"]]))
        picture(work, PICTURED)


if __name__ == "__main__":
    main()
