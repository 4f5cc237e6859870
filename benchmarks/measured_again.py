"""Adds measures of verdicts that came later, "forgotten" and "prompts_lost", to rows of claims.jsonl without them.

    python benchmarks/measured_again.py WORK     # WORK: dreambooth_claims.py's --work, with the runs of these rows

Only the end of a run is measured: no earlier weights are kept. Rows whose runs are not in WORK stay as they are.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from claims_adherence import lost_at
from claims_measure import kind_of, load
from dreambooth_claims import DONE, ROWS

from finetune.core.files import write_text
from finetune.core.logging import quiet
from finetune.families.base import Family
from finetune.families.source import load_family
from finetune.jobs.neutral import base_prompts
from finetune.jobs.open import open_result
from finetune.objectives.densities import Uniform
from finetune.objectives.registry import build_objective
from finetune.objectives.settings import ObjectiveSettings
from finetune.verdicts.bank import Bank, Canvas
from finetune.verdicts.base import DRAWN, DRAWN_PLAIN, Look, Sets
from finetune.verdicts.measures.forgotten import Forgotten
from finetune.verdicts.measures.prompts_lost import PromptsLost
from finetune.verdicts.points import Predict, Predictor
from finetune.verdicts.probe import Material, known_prompts, make_sets

TOGETHER = 16  # points that are predicted at once


@cache
def the_base() -> tuple[Family, Predict]:
    family = load_family("tiny")
    return family, Predictor(family, family.encode_prompts, TOGETHER)


@cache
def asked_of(kind: str, work: Path) -> tuple[Sets, dict[str, Sequence[torch.Tensor]]]:
    """The points at the base's own drawings without a class's name, as a run has them, and the base's predictions."""
    family, predict = the_base()
    objective = build_objective(ObjectiveSettings(density=Uniform()), family.schedule, family.shift(family.resolution))
    side = family.resolution // family.codec.factor
    canvas = Canvas((family.codec.channels, side, side), family.resolution, objective, family.timestep_fraction)
    known = known_prompts([kind], base_prompts(family.folder))
    sets = make_sets(Material([], [], [(None, "")], [], known), Bank(predict, canvas, "tiny", work / "measured again"))
    return sets, {name: predict(sets[name]) for name in (DRAWN, DRAWN_PLAIN)}


def folder_of(row: dict[str, Any], work: Path) -> Path:
    own = f"{row['subject']}-{row['seed']}-{row['settings'].partition('-')[0]}"
    return work / str(row["base"])[:8] / own


def lost(row: dict[str, Any], work: Path) -> dict[str, float]:
    """What its images lost of each place; nothing if they are not there."""
    folder, kind = folder_of(row, work), kind_of(row["subject"])
    drawn = folder / f"drawn-{row['settings'].partition('-')[2]}"
    return lost_at(load(drawn, kind), kind, row["seed"], folder.parent) if (drawn / DONE).is_file() else {}


def forgotten(row: dict[str, Any], work: Path) -> float | None:
    """The measure at the end of a row's run; None if its run is not there."""
    folder = folder_of(row, work)
    if not (folder / "cpu-seconds.json").is_file():
        return None
    family, _ = open_result(folder)
    sets, base = asked_of(kind_of(row["subject"]), work)
    predict = Predictor(family, family.encode_prompts, TOGETHER)
    now = {name: predict(sets[name]) for name in (DRAWN, DRAWN_PLAIN)}
    return round(Forgotten().value(Look(sets, now, base)), 6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    work = parser.parse_args().work.absolute()
    quiet()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        if row["case"] == "base" or not row["verdicts"]:
            continue
        last, about = row["verdicts"][-1], (row["subject"], row["seed"], row["case"])
        if Forgotten.name not in last and (value := forgotten(row, work)) is not None:
            last[Forgotten.name] = value
            print(*about, f"forgotten {value:.2f}", flush=True)
        if "lost_at" not in row and (places := lost(row, work)):
            row["lost_at"], last[PromptsLost.name] = places, max(places.values())
            print(*about, f"lost {places}", flush=True)
    write_text(ROWS, "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))


if __name__ == "__main__":
    main()
