"""Are the verdicts on a run true? Runs made to be good or bad, judged by a judge and by them.

    python benchmarks/verdicts.py                         # all 70 runs, then the table
    python benchmarks/verdicts.py --subjects mug --recipes default short     # some of them
    python benchmarks/verdicts.py --table                 # the table of the stored rows, with the current rules

Each run trains the recipe `demo` on the tiny base with the changes of RECIPES. The judge (examples/tiny_base/judge.py)
looks at images of the result; the verdict comes from the run's own measures, which see no judge. Rows are added to
verdicts.jsonl beside this file; finished ones are not repeated. The rules' limits (finetune/verdicts/rules.py) may be
set by the rows of DEVELOPMENT alone. The held-out subjects follow from HELD_OUT_SEED, and nothing was tuned on them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "tiny_base"))

import numpy as np
import torch
from PIL import Image
from world import CLASSES, SUBJECTS, Look, pose, render, wild_look

from finetune import load_recipe, train
from finetune.core.logging import quiet
from finetune.families.base import Family
from finetune.families.source import load_family
from finetune.jobs.open import open_result
from finetune.sampling.draw import draw
from finetune.sampling.settings import Sampling
from finetune.verdicts.rows import FILE, Row, read_rows
from finetune.verdicts.rules import DAMAGED, DRIFTED, GOOD, OVERTRAINED, UNDERTRAINED, judged

STORED = Path(__file__).with_name("verdicts.jsonl")
RECIPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "short": ("run.steps=60",),
    "faint": ("optim.lr=1e-4", "run.steps=250"),
    "half": ("run.steps=200",),
    "slow": ("optim.lr=7e-4",),
    "no prior": ("prior.kind=none",),
    "no prior, short": ("prior.kind=none", "run.steps=150"),
    "hot": ("optim.lr=6e-3",),
    "hot, no prior": ("optim.lr=6e-3", "prior.kind=none", "optim.schedule=constant"),
    "frozen base": ("prior.kind=frozen_base",),
}
DEVELOPMENT = tuple(SUBJECTS)  # mug, backpack, car
HELD_OUT_SEED, HELD_OUT = 20261122, 4
PHOTO_PLACES = ("table", "grass", "city", "table", "grass")  # none on the beach or in the snow
COUNT, STEPS, GUIDANCE = 16, 15, 3.0
AXES = (UNDERTRAINED, OVERTRAINED, DRIFTED, DAMAGED)


@dataclass(frozen=True)
class Subject:
    """Something that the base has never seen."""

    name: str
    look: Look

    @property
    def noun(self) -> str:
        """Its class."""
        return self.look.kind

    def picture(self, number: int, place: str, pixels: int = 64) -> Image.Image:
        """Its picture at a place, in the pose of this number."""
        return render(pose(self.look, place, np.random.default_rng((78, CLASSES.index(self.noun), number))), pixels)


def subjects() -> dict[str, Subject]:
    """The development subjects, then the held-out ones: wild looks by HELD_OUT_SEED, of different classes."""
    found = {name: Subject(name, SUBJECTS[name]) for name in DEVELOPMENT}
    kinds = np.random.default_rng(HELD_OUT_SEED).permutation(CLASSES)[:HELD_OUT]
    for number, kind in enumerate(kinds):
        name = f"held-out {kind}"
        found[name] = Subject(name, wild_look(np.random.default_rng((HELD_OUT_SEED, number)), str(kind)))
    return found


# --- the judge: to be exchanged with the judge of another tiny base


def seen_by_judge(family: Family, subject: Subject, thing: str) -> dict[str, float]:
    """Shares from 0 to 1, of images by a model. `gain` is the way from the class to the subject; `beach` the share on
    the beach that is there; `others` the full captions of other classes that are right; `empty` the empty prompts that
    draw the subject's class; `class_is_subject` the plain class prompts that show the subject."""
    import judge
    from captions import full_caption

    model = judge.load_judge()
    references = [subject.picture(500 + n, PHOTO_PLACES[n % 5]) for n in range(20)]
    real = judge.likeness(model, [subject.picture(600 + n, PHOTO_PLACES[n % 5]) for n in range(20)], references).mean()
    classes = judge.likeness(model, [judge.class_picture(subject.noun, n) for n in range(60)], references).mean()
    asked = _other_facts(subject.noun)
    prompts = {
        "own": [f"a photo of {thing}"] * COUNT,
        "beach": [f"a photo of {thing} on the beach"] * COUNT,
        "class": [f"a photo of a {subject.noun}"] * COUNT,
        "empty": [""] * COUNT,
        "others": [full_caption(facts) for facts in asked],
    }
    sampling = Sampling(steps=STEPS, guidance=GUIDANCE, size=64)
    drawn = {name: draw(family, texts, sampling, seeds=range(len(texts))) for name, texts in prompts.items()}
    own, plain = (judge.likeness(model, drawn[name], references) for name in ("own", "class"))
    seen, empty = judge.classify(model, drawn["others"]), judge.classify(model, drawn["empty"])["kind"]
    right = [all(seen[name][n] == getattr(facts, name) for name in seen) for n, facts in enumerate(asked)]
    return {
        "gain": float((own.mean() - classes) / (real - classes)),
        "class_is_subject": float((plain > (real + classes) / 2).float().mean()),
        "beach": sum(place == "beach" for place in judge.classify(model, drawn["beach"])["place"]) / COUNT,
        "others": sum(right) / len(right),
        "empty": sum(kind == subject.noun for kind in empty) / COUNT,
    }


def _other_facts(noun: str) -> list[Any]:
    """COUNT things of other classes, by a fixed seed."""
    from world import random_facts

    rng, found = np.random.default_rng(9), []
    while len(found) < COUNT:
        facts = random_facts(rng)
        found += [facts] if facts.kind != noun else []
    return found


# --- what is true of a run, by the judge


def truth(seen: dict[str, float], base: dict[str, float]) -> list[str]:
    """The words that hold, by the judge. `base`: the same shares before training."""
    found = []
    if seen["gain"] < 0.5:
        found.append(UNDERTRAINED)
    if seen["gain"] >= 0.5 and seen["beach"] < 0.7:
        found.append(OVERTRAINED)  # unseen places are forgotten
    if seen["class_is_subject"] > base["class_is_subject"] + 0.25:
        found.append(DRIFTED)
    if seen["others"] < base["others"] - 0.2 or seen["empty"] > base["empty"] + 0.4:
        found.append(DAMAGED)
    return found or [GOOD]


# --- runs


def one_run(work: Path, subject: Subject, name: str) -> dict[str, Any]:
    """Trains the recipe `name` of RECIPES on a subject, and asks the judge: a row of verdicts.jsonl."""
    photos = work / "photos" / subject.name.replace(" ", "-")
    photos.mkdir(parents=True, exist_ok=True)
    for number, place in enumerate(PHOTO_PLACES):
        subject.picture(number, place, pixels=256).save(photos / f"{number}.png")
    settings = [
        f"data.photos={photos}",
        f"data.class_noun={subject.noun}",
        "sample.prompts=['a photo of {token} {noun}']",
        "export.verify=off",
        "run.verdicts=on",
    ]
    folder = work / "runs" / f"{subject.name}-{name}".replace(" ", "-").replace(",", "")
    began = time.process_time()
    train(load_recipe("demo", [*settings, *RECIPES[name]]), folder)
    seconds = time.process_time() - began
    rows = read_rows(folder / FILE)
    family, info = open_result(folder)
    seen = seen_by_judge(family, subject, f"{info.token} {subject.noun}")
    before = next((row["base"] for row in stored() if row["subject"] == subject.name), None)
    before = before or seen_by_judge(load_family("tiny"), subject, f"{info.token} {subject.noun}")
    return {
        "subject": subject.name,
        "recipe": name,
        "development": subject.name in DEVELOPMENT,
        "judge": {key: round(value, 3) for key, value in seen.items()},
        "base": {key: round(value, 3) for key, value in before.items()},
        "rows": [{"step": row.step, **row.values, "seconds": row.seconds} for row in rows],
        "cpu_seconds": round(seconds, 1),
    }


def stored() -> list[dict[str, Any]]:
    """The finished rows."""
    if not STORED.is_file():
        return []
    return [json.loads(line) for line in STORED.read_text(encoding="utf-8").splitlines()]


def _row(values: dict[str, float]) -> Row:
    own = {key: value for key, value in values.items() if key not in ("step", "seconds")}
    return Row(int(values["step"]), own, values["seconds"])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Each run with the judge's words and the verdict's; then the agreement for each word, and for the first one."""
    lines = ["| subject | recipe | judge | verdict |", "|---|---|---|---|"]
    counts: dict[tuple[bool, str], list[bool]] = {}
    for row in rows:
        said = judged([_row(values) for values in row["rows"]])
        wanted = truth(row["judge"], row["base"])
        lines.append(f"| {row['subject']} | {row['recipe']} | {', '.join(wanted)} | {', '.join(said.found)} |")
        for word in AXES:
            agreed = (word in wanted) == (word in said.found)
            counts.setdefault((row["development"], word), []).append(agreed)
        counts.setdefault((row["development"], "good or not"), []).append((wanted == [GOOD]) == (said.word == GOOD))
    lines += ["", "| | development | held out |", "|---|---|---|"]
    for word in (*AXES, "good or not"):
        cells = [_share(counts.get((development, word), [])) for development in (True, False)]
        lines.append(f"| {word} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _share(agreed: list[bool]) -> str:
    return f"{sum(agreed)} of {len(agreed)}" if agreed else "none yet"


def main() -> None:
    """Trains the runs that have no row yet, and prints the table of all rows."""
    every = subjects()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "verdicts-benchmark")
    parser.add_argument("--subjects", nargs="+", default=list(every), choices=list(every))
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--table", action="store_true", help="no runs: the table of the stored rows")
    arguments = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    done = {(row["subject"], row["recipe"]) for row in stored()}
    for subject, name in product(arguments.subjects, arguments.recipes):
        if arguments.table or (subject, name) in done:
            continue
        row = one_run(arguments.work.absolute(), every[subject], name)
        with STORED.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(row) + "\n")
        print(subject, name, truth(row["judge"], row["base"]), row["judge"], flush=True)
    print(table(stored()))


if __name__ == "__main__":
    main()
