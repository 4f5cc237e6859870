"""DreamBooth's claims, measured on the tiny base: 3 subjects x 3 seeds x {LoRA, full} x {no prior, class images}.

    python benchmarks/dreambooth_claims.py                    # all 36 runs, then docs/results.md
    python benchmarks/dreambooth_claims.py --subjects mug --seeds 0 --methods lora run.steps=200   # a trial

Each run trains with `finetune.train` and the included recipe, and draws 24 images for each prompt with the trained
weights. A classifier that was trained only on renders (examples/tiny_base/judge.py) rates them. Finished runs are kept
under --work and not repeated. Overrides apply to every run; their results are a trial and not written to the page.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "tiny_base"))
os.environ.setdefault("OMP_NUM_THREADS", "1")

SUBJECTS, SEEDS, METHODS, PRIORS = ("mug", "backpack", "car"), (0, 1, 2), ("lora", "full"), ("none", "class_images")
PHOTO_PLACES = ("table", "grass", "city", "table", "grass")  # there are no photos on the beach or in the snow
COUNT, GUIDANCE, STEPS = 24, 3.0, 20
RECIPES = {"lora": "demo", "full": "demo-full"}


def photos_of(subject: str, work: Path) -> Path:
    """Writes five 256-pixel photos of a subject that the base has never seen."""
    from world import subject_picture

    folder = work / "photos" / subject
    folder.mkdir(parents=True, exist_ok=True)
    for number, place in enumerate(PHOTO_PLACES):
        file = folder / f"{number}.png"
        if not file.is_file():
            subject_picture(subject, 100 + number, place, pixels=256).save(file)
    return folder


def one_run(
    work: Path, subject: str, seed: int, method: str, prior: str, overrides: tuple[str, ...]
) -> dict[str, Any]:
    """Trains one combination, unless its result exists, and measures it."""
    from finetune.core.logging import quiet

    quiet()
    import torch

    torch.set_num_threads(1)
    from finetune import load_recipe, train
    from finetune.jobs.open import open_result

    name = f"{subject}-{seed}-{method}-{prior}"
    tag = hashlib.sha256(" ".join(overrides).encode()).hexdigest()[:6] if overrides else "default"
    folder = work / tag / name
    done = folder / "measured.json"
    if done.is_file():
        return json.loads(done.read_text(encoding="utf-8"))
    settings = [
        f"data.photos={photos_of(subject, work)}",
        f"data.class_noun={subject}",
        f"run.seed={seed}",
        "sample.prompts=['a photo of {token} {noun}']",
        "sample.count=1",
        f"prior.kind={prior}",
    ]
    began = time.process_time()
    train(load_recipe(RECIPES[method], [*settings, *overrides]), folder)
    seconds = time.process_time() - began
    family, info = open_result(folder)
    measured = {"subject": subject, "seed": seed, "method": method, "prior": prior, "cpu_seconds": seconds}
    measured |= measure(family, subject, f"{info.token} {subject}", seed, folder)
    done.write_text(json.dumps(measured, indent=2), encoding="utf-8", newline="\n")
    return measured


def measure(family: Any, subject: str, thing: str, seed: int, folder: Path | None = None) -> dict[str, float]:
    """The judge's ratings of 24 images for each of three prompts."""
    import judge
    from world import subject_picture

    from finetune.sampling.draw import draw
    from finetune.sampling.images import grid
    from finetune.sampling.settings import Sampling

    prompts = {
        "subject": f"a photo of {thing}",
        "class": f"a photo of a {subject}",
        "beach": f"a photo of {thing} on the beach",
    }
    seeds = [1000 * seed + number for number in range(COUNT)]
    drawn = {
        name: draw(family, [text] * COUNT, Sampling(steps=STEPS, guidance=GUIDANCE, size=64), seeds=seeds)
        for name, text in prompts.items()
    }
    if folder is not None:
        for name, images in drawn.items():
            grid(images, 8).save(folder / f"{name}.png")
    model = judge.load_judge()
    references = [subject_picture(subject, number) for number in range(20)]
    real = judge.likeness(model, [subject_picture(subject, 500 + n) for n in range(40)], references)
    others = judge.likeness(model, [judge.class_picture(subject, n) for n in range(100)], references)
    threshold = float(real.mean() + others.mean()) / 2
    own = judge.likeness(model, drawn["subject"], references)
    plain = judge.likeness(model, drawn["class"], references)
    places = judge.classify(model, drawn["beach"])["place"]
    return {
        "real": float(real.mean()),
        "likeness": float(own.mean()),
        "is_subject": float((own > threshold).float().mean()),
        "class_likeness": float(plain.mean()),
        "class_is_subject": float((plain > threshold).float().mean()),
        "class_diversity": judge.diversity(model, drawn["class"]),
        "beach": sum(place == "beach" for place in places) / COUNT,
        "beach_likeness": float(judge.likeness(model, drawn["beach"], references).mean()),
    }


def base_figures(work: Path, subject: str, seed: int) -> dict[str, Any]:
    """The same measurements for the base before training."""
    from finetune.core.logging import quiet

    quiet()
    import torch

    torch.set_num_threads(1)
    from finetune.data import tokens
    from finetune.families.source import load_family

    file = work / "base" / f"{subject}-{seed}.json"
    if not file.is_file():
        family = load_family("tiny")
        token = tokens.suggest(family, 1, subject)[0].text
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(
            json.dumps(measure(family, subject, f"{token} {subject}", seed)), encoding="utf-8", newline="\n"
        )
    return {"subject": subject, "seed": seed, **json.loads(file.read_text(encoding="utf-8"))}


def derive(row: dict[str, Any], base: dict[str, Any]) -> dict[str, float]:
    """The figures for the claims: the gain from the class towards the subject, and diversity relative to the base."""

    def gain(key: str) -> float:
        return (row[key] - base["class_likeness"]) / (row["real"] - base["class_likeness"])

    return {
        "gain": gain("likeness"),
        "gain on the beach": gain("beach_likeness"),
        "is the subject": row["is_subject"],
        "“a noun” is the subject": row["class_is_subject"],
        "diversity": row["class_diversity"] / base["class_diversity"],
        "on the beach": row["beach"],
        "CPU-s": row["cpu_seconds"],
    }


def table(rows: list[dict[str, Any]], bases: dict[tuple[str, int], dict[str, Any]]) -> str:
    """A Markdown table: mean and, over subjects and seeds, standard deviation."""
    untouched = [derive(base | {"cpu_seconds": 0.0}, base) for base in bases.values()]
    lines = [
        f"| method | prior | runs | {' | '.join(untouched[0])} |",
        "|---" * (len(untouched[0]) + 3) + "|",
        f"| the base, untouched | | | {' | '.join(_cells(untouched))} |",
    ]
    for method, prior in product(METHODS, PRIORS):
        chosen = [
            derive(r, bases[r["subject"], r["seed"]]) for r in rows if (r["method"], r["prior"]) == (method, prior)
        ]
        if chosen:
            lines.append(f"| {method} | {prior.replace('_', ' ')} | {len(chosen)} | {' | '.join(_cells(chosen))} |")
    return "\n".join(lines)


def _cells(chosen: list[dict[str, float]]) -> list[str]:
    return [_cell([item[key] for item in chosen]) for key in chosen[0]]


def _cell(values: list[float]) -> str:
    digits = 0 if max(values) > 10 else 2
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"


def verdicts(rows: list[dict[str, Any]], bases: dict[tuple[str, int], dict[str, Any]]) -> list[str]:
    """Each claim with its bound and the measured mean over subjects and seeds."""

    def mean(key: str, method: str, prior: str) -> float:
        chosen = [r for r in rows if (r["method"], r["prior"]) == (method, prior)]
        return statistics.mean(derive(r, bases[r["subject"], r["seed"]])[key] for r in chosen)

    lines = []
    for method in METHODS:
        claims = (
            ("likeness gain", "gain", "class_images", 0.7, True),
            (
                "“a noun” has become the subject, with class images",
                "“a noun” is the subject",
                "class_images",
                0.05,
                False,
            ),
            ("diversity of “a noun” against the base, with class images", "diversity", "class_images", 0.8, True),
            ("collapse without class images", "“a noun” is the subject", "none", 0.4, True),
            ("new places drawn", "on the beach", "class_images", 0.9, True),
        )
        for text, key, prior, bound, at_least in claims:
            value = mean(key, method, prior)
            holds = value >= bound if at_least else value <= bound
            sign = "≥" if at_least else "≤"
            lines.append(
                f"- {'holds' if holds else '**DOES NOT HOLD**'}: {method}, {text}: {value:.2f} ({sign} {bound})"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="section.key=value: a trial")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "dreambooth-claims")
    parser.add_argument("--subjects", nargs="+", default=SUBJECTS, choices=SUBJECTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--priors", nargs="+", default=PRIORS, choices=PRIORS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    combinations = list(product(arguments.subjects, arguments.seeds, arguments.methods, arguments.priors))
    with ProcessPoolExecutor(arguments.jobs) as pool:
        pairs = list(product(arguments.subjects, arguments.seeds))
        bases = [pool.submit(base_figures, work, *pair) for pair in pairs]
        runs = [pool.submit(one_run, work, *combination, tuple(arguments.overrides)) for combination in combinations]
        held = {pair: future.result() for pair, future in zip(pairs, bases, strict=True)}
        rows = []
        for future in runs:
            rows.append(future.result())
            row = rows[-1]
            figures = {key: round(value, 2) for key, value in derive(row, held[row["subject"], row["seed"]]).items()}
            print(row["subject"], row["seed"], row["method"], row["prior"], figures, flush=True)
    print(table(rows, held))
    whole = len(combinations) == len(SUBJECTS) * len(SEEDS) * len(METHODS) * len(PRIORS) and not arguments.overrides
    if whole:
        lines = verdicts(rows, held)
        print("\n".join(lines))
        write_results(table(rows, held), lines)


def write_results(text: str, lines: list[str]) -> None:
    """Replaces the text between the markers in docs/results.md."""
    file = ROOT / "docs" / "results.md"
    before, _, rest = file.read_text(encoding="utf-8").partition("<!-- claims -->")
    _, _, after = rest.partition("<!-- end of claims -->")
    claims = "\n".join(lines)
    file.write_text(
        f"{before}<!-- claims -->\n{text}\n\n{claims}\n<!-- end of claims -->{after}", encoding="utf-8", newline="\n"
    )


if __name__ == "__main__":
    main()
