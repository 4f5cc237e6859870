"""DreamBooth's claims, measured on the tiny base: development and held-out subjects, methods, priors, seeds.

    python benchmarks/dreambooth_claims.py                           # what is missing, then docs/results.md
    python benchmarks/dreambooth_claims.py --only levers             # what was tried on the development subjects
    python benchmarks/dreambooth_claims.py --subjects mug --seeds 0 --cases lora run.steps=200     # a trial
    python benchmarks/dreambooth_claims.py --table                   # only the tables, from the stored rows

The subjects are those of examples/tiny_base/looks.py: four for development, which may be tuned on, and twelve
held-out ones (two of each class) that a fixed seed chose before any recipe was tuned. Every run trains with
`finetune.train` and a recipe (claims_cases.py), and with verdicts on, which change nothing in the result.
claims_measure.py says what is measured. Rows are added to claims.jsonl beside this file, and one that is there is not
measured again. A row names its base, its judge and the recipe's settings; rows of others are not shown. Overrides are
a trial: they have rows of their own, and the page is not written.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import claims_page
import torch
from claims_adherence import lost_at
from claims_cases import (
    CASES,
    CLASS_TEACHER,
    EARLIER_DEFAULTS,
    EARLIER_PRIORS,
    FAINT_LOGOS,
    FAULTS,
    FULL_PRIORS,
    LEVERS,
    METHODS,
    PEERS,
    PRIOR_IMAGES,
    PRIORS,
    SMALL_LOGOS,
    Case,
)
from claims_measure import Drawn, copies, kind_of, load, masked, measure, photos_of, real_figures, save
from claims_settings import Settings, digest, keep, known, still_holds

from finetune import load_recipe, train
from finetune.config.recipe import Recipe
from finetune.core.logging import quiet
from finetune.data import tokens
from finetune.families.digests import base_hash
from finetune.families.source import load_family, resolve_base
from finetune.jobs.open import open_result
from finetune.verdicts.measures.prompts_lost import PromptsLost
from finetune.verdicts.rows import FILE, read_rows

import judge  # isort: skip - examples/tiny_base, which claims_measure has put on the path
from looks import DEVELOPMENT, EVERY, FOR_DEVELOPMENT, HELD_OUT, MOONS, SUBJECTS  # isort: skip

DONE = "done.json"  # in a folder of images: all of them are there; the share of copies
ROWS = Path(__file__).with_name("claims.jsonl")
SEEDS = (0, 1, 2)
FIRST_SEED = SEEDS[:1]  # of cases that stand beside the default recipe
FIRST_SUBJECTS = tuple({kind_of(name): name for name in reversed(HELD_OUT)}.values())  # one held-out of a class
Row = dict[str, Any]
Key = tuple[str, int, str, str]  # subject, seed, case ("base" for the untouched base), overrides


@dataclass(frozen=True)
class Group:
    """Cases with the subjects and seeds that are measured if nothing else is asked for."""

    cases: tuple[Case, ...]
    subjects: tuple[str, ...] = tuple(SUBJECTS)
    seeds: tuple[int, ...] = FIRST_SEED


GROUPS = {
    "default": Group(METHODS[:1], seeds=SEEDS),
    "methods": Group(METHODS[1:], FIRST_SUBJECTS),
    "earlier defaults": Group(EARLIER_DEFAULTS),
    "priors": Group((*PRIORS, *FULL_PRIORS), FIRST_SUBJECTS),
    "earlier priors": Group(EARLIER_PRIORS, FIRST_SUBJECTS),
    "peers": Group(PEERS, FIRST_SUBJECTS),
    "levers": Group(LEVERS, tuple(DEVELOPMENT)),
    "logos": Group(SMALL_LOGOS, tuple(MOONS)),
    "prior images": Group(PRIOR_IMAGES, FAINT_LOGOS),
    "class teacher": Group(CLASS_TEACHER, tuple(FOR_DEVELOPMENT)),
    "faults": Group(FAULTS),
}


def key_of(row: Row) -> Key:
    return row["subject"], row["seed"], row["case"], row["overrides"]


@cache
def stamp() -> dict[str, str]:
    """The base and the judge that a row belongs to."""
    return {"base": base_hash(resolve_base("tiny")), "judge": judge.fingerprint()}


@cache
def recipe_of(case: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """A case's recipe, with what its subjects and seeds have in common."""
    return load_recipe(CASES[case].recipe, [*_of(Path("photos"), "mug", 0), *CASES[case].settings, *overrides])


@cache
def settings_of(case: str, overrides: tuple[str, ...] = ()) -> str:
    """A hash of a case's recipe, and the strength of its adapter."""
    return "" if case == "base" else f"{digest(recipe_of(case, overrides))}-{CASES[case].weight:g}"


def stored() -> dict[Key, Row]:
    """The rows of this base, this judge and the cases' settings of today."""
    if not ROWS.is_file():
        return {}
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["case"] in {"base", *CASES} and stamp().items() <= row.items()]
    recipes = known()
    return {key_of(row): row for row in rows if _of_today(row, recipes)}


def _of_today(row: Row, recipes: dict[str, Settings]) -> bool:
    case, overrides = row["case"], tuple(shlex.split(row["overrides"]))
    if row["settings"] == settings_of(case, overrides):
        return True
    name, _, weight = row["settings"].partition("-")
    if case == "base" or weight != f"{CASES[case].weight:g}" or name not in recipes:
        return False
    return still_holds(recipes[name], recipe_of(case, overrides))


def store(row: Row) -> None:
    if row["case"] != "base":
        keep(recipe_of(row["case"], tuple(shlex.split(row["overrides"]))))
    with ROWS.open("a", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(row, sort_keys=True) + "\n")


def one_run(work: Path, of: tuple[str, int], case: Case, overrides: tuple[str, ...]) -> Row:
    """Trains one combination, draws its images and measures them. What is stored of it is not made again, so another
    judge only reads the images."""
    quiet()
    torch.set_num_threads(1)
    subject, seed = of
    own, photos = settings_of(case.name, overrides), photos_of(subject, work)
    given = masked(photos) if case.masked else photos
    recipe = load_recipe(case.recipe, [*_of(given, subject, seed), *case.settings, *overrides])
    folder = work / stamp()["base"][:8] / f"{subject}-{seed}-{own.partition('-')[0]}"
    seconds = _trained(recipe, folder)
    drawn = folder / f"drawn-{case.weight:g}"
    if not (drawn / DONE).is_file():
        family, info = open_result(folder, weight=case.weight)
        sets = Drawn(kind_of(subject), info.names[0], seed, family).sets()
        save(sets, drawn)
        (drawn / DONE).write_text(json.dumps(copies(sets["own"], photos, family)), encoding="utf-8", newline="\n")
    row: Row = {"subject": subject, "seed": seed, "case": case.name, "overrides": shlex.join(overrides)}
    row |= {
        "steps": recipe.run.steps,
        "cpu_seconds": seconds,
        "copies": json.loads((drawn / DONE).read_text(encoding="utf-8")),
    }
    sets = load(drawn, kind_of(subject))
    row |= {name: round(value, 4) for name, value in measure(sets, subject).items()} | stamp() | {"settings": own}
    verdicts = [{"step": one.step, **one.values} for one in read_rows(folder / FILE)]
    lost = lost_at(sets, kind_of(subject), seed, folder.parent)
    if verdicts and lost:
        verdicts[-1][PromptsLost.name] = max(lost.values())
    return row | {"verdicts": verdicts, "lost_at": lost}


def _trained(recipe: Recipe, folder: Path) -> float:
    """Trains a run, unless it is there. Returns its CPU-seconds."""
    took = folder / "cpu-seconds.json"
    if not took.is_file():
        if folder.exists():
            shutil.rmtree(folder)  # left by a benchmark that was stopped
        began = time.process_time()
        train(recipe, folder)
        took.write_text(json.dumps(round(time.process_time() - began, 1)), encoding="utf-8", newline="\n")
    return float(json.loads(took.read_text(encoding="utf-8")))


def _of(photos: Path, subject: str, seed: int) -> list[str]:
    """What every run has: its subject and seed, and no more drawing and exporting than the measurement needs."""
    return [
        "base=tiny",
        f"data.photos={photos}",
        f"data.class_noun={kind_of(subject)}",
        f"run.seed={seed}",
        "run.verdicts=on",
        "sample.prompts=['a photo of {token} {noun}']",
        "sample.count=1",
        "sample.guidance=5",
        "export.verify=off",
    ]


def of_base(work: Path, kind: str, seed: int) -> list[Row]:
    """The same measurements of the untouched base for all subjects of a class, and of renders of each."""
    quiet()
    torch.set_num_threads(1)
    drawn, family = work / stamp()["base"][:8] / f"base-{kind}-{seed}", load_family("tiny")
    if not (drawn / DONE).is_file():
        save(Drawn(kind, f"{tokens.suggest(family, 1, kind)[0].text} {kind}", seed, family).sets(), drawn)
        (drawn / DONE).write_text("", encoding="utf-8", newline="\n")
    rows = []
    for subject in (name for name in EVERY if kind_of(name) == kind):
        row = {"subject": subject, "seed": seed, "case": "base", "overrides": "", "cpu_seconds": 0.0, "steps": 0}
        figures = measure(load(drawn, kind), subject) | real_figures(subject, family)
        rows.append(row | {name: round(value, 4) for name, value in figures.items()} | stamp() | {"settings": ""})
    return rows


def missing(arguments: argparse.Namespace) -> tuple[list[tuple[str, int]], list[tuple[str, int, str]]]:
    """(class, seed) of the bases and (subject, seed, case) of the runs that are wanted and not stored."""
    there, overrides = stored(), shlex.join(arguments.overrides)
    wanted = dict.fromkeys(_wanted(arguments))
    bases = {(kind_of(s), n): None for s, n, _ in wanted if (s, n, "base", "") not in there}
    return list(bases), [key for key in wanted if (*key, overrides) not in there]


def _wanted(arguments: argparse.Namespace) -> Iterator[tuple[str, int, str]]:
    """Seed by seed and group by group, so that a table of a part of the runs compares like with like."""
    groups = [GROUPS[name] for name in arguments.only]
    if arguments.cases:
        groups = [Group(tuple(CASES[name] for name in arguments.cases))]
    for seed, group in product(arguments.seeds or SEEDS, groups):
        if seed in (arguments.seeds or group.seeds):
            for case, subject in product(group.cases, arguments.subjects or group.subjects):
                yield subject, seed, case.name


def run_missing(arguments: argparse.Namespace) -> int:
    """Measures what is missing, the bases first, and stores each row as it comes. Returns how many runs failed."""
    work, (bases, runs) = arguments.work.absolute(), missing(arguments)
    with ProcessPoolExecutor(arguments.jobs) as pool:
        started: list[Future[Any]] = [pool.submit(of_base, work, kind, seed) for kind, seed in bases]
        for subject, seed, case in runs:
            started.append(pool.submit(one_run, work, (subject, seed), CASES[case], tuple(arguments.overrides)))
        return sum(not _stored(future) for future in as_completed(started))


def _stored(future: Future[Any]) -> bool:
    """Stores the rows of a run that is over; False if it failed. The other runs go on."""
    if future.exception():
        traceback.print_exception(future.exception())
        return False
    found = future.result()
    for row in found if isinstance(found, list) else [found]:
        store(row)
        print(claims_page.line(row, stored()), flush=True)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="section.key=value: a trial")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "dreambooth-claims")
    parser.add_argument("--only", nargs="+", default=list(GROUPS), choices=GROUPS, help="groups of cases")
    parser.add_argument("--subjects", nargs="+", choices=EVERY)
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--cases", nargs="+", choices=CASES, help="instead of groups")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    failed = 0 if arguments.table else run_missing(arguments)
    tables = claims_page.tables(stored(), shlex.join(arguments.overrides))
    print(tables)
    if not arguments.overrides:
        claims_page.write(tables)
    if failed:
        sys.exit(f"{failed} runs failed: see above")


if __name__ == "__main__":
    main()
