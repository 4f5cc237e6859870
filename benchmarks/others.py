"""A prior of everything else, measured on the tiny base: what `prior.others` gives, and what it costs.

    python benchmarks/others.py                                          # every setting, on the development subject
    python benchmarks/others.py --settings images --subjects car --seeds 1
    python benchmarks/others.py --table                                  # the table of all finished rows
    python benchmarks/others.py run.steps=300 --settings without         # a trial: rows of their own

Each run trains the recipe `demo`. The judge rates 24 images for each of dreambooth_claims.py's prompts, full captions
of the other classes and of the own one (combinations that the base was never trained on, so they are not in its
list of prompts either), and the empty prompt; the same for the untouched base, at the same seeds. Rows are added to
others.jsonl beside this file; finished ones are not repeated, and a run that was cut off goes on. A row belongs to the
base whose hash it has: another tiny base has rows of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import dreambooth_claims as claims
import torch

from finetune import load_recipe, train
from finetune.core.logging import quiet
from finetune.families.digests import base_hash
from finetune.families.source import load_family, resolve_base
from finetune.jobs.open import open_result
from finetune.sampling.draw import draw
from finetune.sampling.images import grid
from finetune.sampling.settings import Sampling

import captions  # isort: skip - examples/tiny_base, which dreambooth_claims.py has put on the path
import judge  # isort: skip
import numpy as np  # isort: skip
from world import Facts, held_out, random_facts  # isort: skip

OTHERS = "prior.others={guidance: 3.0}"
PLAIN = "prior.caption_dropout=0"  # the empty prompt belongs to the images of everything else
SETTINGS: dict[str, tuple[str, ...]] = {
    "without": (),
    "images": (OTHERS, PLAIN),
    "teacher": (OTHERS, PLAIN, "prior.others.target=base"),
    "half": (OTHERS, PLAIN, "prior.others.share=0.5"),
    "no class images": ("prior.kind=none", OTHERS),
    "frozen_base": ("prior.kind=frozen_base",),
    "frozen_base, images": ("prior.kind=frozen_base", OTHERS, PLAIN),
}
ROWS = Path(__file__).with_suffix(".jsonl")
FIRST = ("without", "images", "teacher")
OF_OTHERS, OF_OWN, EMPTY = 60, 24, 48
Row = dict[str, Any]


def asked(subject: str) -> tuple[list[Facts], list[Facts]]:
    """Unseen combinations of all other classes, and of the subject's own: always the same ones."""
    rng, others, own = np.random.default_rng(31), [], []
    while len(others) < OF_OTHERS or len(own) < OF_OWN:
        facts = random_facts(rng)
        if held_out(facts):
            (own if facts.kind == subject else others).append(facts)
    return others[:OF_OTHERS], own[:OF_OWN]


def right(model: judge.Judge, pictures: list[Any], facts: list[Facts]) -> float:
    """The share of images in which everything that the caption states is right."""
    seen = judge.classify(model, pictures)
    every = [all(seen[head][k] == getattr(fact, head) for head in judge.HEADS) for k, fact in enumerate(facts)]
    return sum(every) / len(every)


def measure(family: Any, subject: str, thing: str, seed: int, folder: Path) -> Row:
    """dreambooth_claims.py's figures, and what became of everything else."""
    model, (others, own) = judge.load_judge(), asked(subject)
    look = Sampling(steps=claims.STEPS, guidance=claims.GUIDANCE, size=64)
    prompts = {
        "others": [captions.full_caption(facts) for facts in others],
        "own": [captions.full_caption(facts) for facts in own],
        "empty": [""] * EMPTY,
    }
    drawn = {
        name: draw(family, texts, look, seeds=[7000 + 1000 * seed + k for k in range(len(texts))])
        for name, texts in prompts.items()
    }
    for name, pictures in drawn.items():
        grid(pictures, 12).save(folder / f"{name}.png")
    kinds = judge.classify(model, drawn["empty"])["kind"]
    return claims.measure(family, subject, thing, seed, folder) | {
        "others": right(model, drawn["others"], others),
        "own": right(model, drawn["own"], own),
        "empty": kinds.count(subject) / EMPTY,
    }


def base_row(work: Path, subject: str, seed: int) -> Row:
    """The same figures of the untouched base, with the token that a run would choose."""
    from finetune.data import tokens

    folder = work / "base" / f"{subject}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    family = load_family("tiny")
    token = tokens.suggest(family, 1, subject)[0].text
    return measure(family, subject, f"{token} {subject}", seed, folder) | {"cpu_seconds": 0.0}


def one_run(work: Path, setting: str, subject: str, seed: int, overrides: tuple[str, ...]) -> Row:
    """Trains one combination, or goes on with it, and measures it."""
    folder = work / "runs" / "-".join([setting, subject, str(seed), *overrides]).replace("/", "_")
    own = [
        f"data.photos={claims.photos_of(subject, work)}",
        f"data.class_noun={subject}",
        f"run.seed={seed}",
        "sample.prompts=['a photo of {token} {noun}']",
        "sample.count=1",
        "export.verify=off",
    ]
    began = time.process_time()
    train(load_recipe("demo", [*own, *SETTINGS[setting], *overrides]), folder)
    seconds = time.process_time() - began
    family, info = open_result(folder)
    return measure(family, subject, f"{info.token} {subject}", seed, folder) | {"cpu_seconds": seconds}


def rows_of(base: str) -> list[Row]:
    """The finished rows of a base."""
    lines = ROWS.read_text(encoding="utf-8").splitlines() if ROWS.is_file() else []
    return [row for row in map(json.loads, lines) if row["base"] == base]


def table(rows: list[Row]) -> str:
    """A Markdown table: a line for each run, beside its base."""
    titles = ("gain", "on the beach", "is the subject", "“a noun” is the subject", "diversity", "others right")
    titles = (*titles, "own class right", "“” draws the class", "CPU-s")
    lines = [f"| setting | subject | seed | {' | '.join(titles)} |", "|---" * (3 + len(titles)) + "|"]
    bases = {(row["subject"], row["seed"]): row for row in rows if row["setting"] == "the base"}
    for row in rows:
        base = bases[row["subject"], row["seed"]]
        own = claims.derive(row, base)
        shown = (own["gain"], own["gain on the beach"], own["is the subject"], own["“a noun” is the subject"])
        shown = (*shown, own["diversity"], row["others"], row["own"], row["empty"])
        name = " ".join([row["setting"], *row["overrides"]])
        cells = [name, row["subject"], str(row["seed"]), *(f"{value:.2f}" for value in shown)]
        lines.append(f"| {' | '.join(cells)} | {row['cpu_seconds']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Trains what has no row for this base yet, and prints the table of its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="section.key=value: a trial")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "others")
    parser.add_argument("--settings", nargs="+", default=FIRST, choices=list(SETTINGS))
    parser.add_argument("--subjects", nargs="+", default=["mug"], choices=claims.SUBJECTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--table", action="store_true", help="only the table of what is there")
    arguments = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    base = base_hash(resolve_base("tiny"))[:12]
    work, overrides = arguments.work.absolute() / base, tuple(arguments.overrides)
    settings = [] if arguments.table else ["the base", *arguments.settings]
    for subject, seed, setting in [(a, b, c) for a in arguments.subjects for b in arguments.seeds for c in settings]:
        given = () if setting == "the base" else overrides
        about = {"base": base, "setting": setting, "subject": subject, "seed": seed, "overrides": list(given)}
        if any(about.items() <= row.items() for row in rows_of(base)):
            continue
        if setting == "the base":
            found = base_row(work, subject, seed)
        else:
            found = one_run(work, setting, subject, seed, given)
        with ROWS.open("a", encoding="utf-8", newline="\n") as opened:
            opened.write(json.dumps(about | found) + "\n")
        print(setting, subject, seed, {key: round(value, 2) for key, value in found.items()}, flush=True)
    print(table(rows_of(base)))


if __name__ == "__main__":
    main()
