"""Adds "forgotten", a measure of verdicts that came later, to rows of claims.jsonl that do not have it.

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
from claims_measure import kind_of
from dreambooth_claims import ROWS

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


def forgotten(row: dict[str, Any], work: Path) -> float | None:
    """The measure at the end of a row's run; None if its run is not there."""
    own = f"{row['subject']}-{row['seed']}-{row['settings'].partition('-')[0]}"
    folder = work / row["base"][:8] / own
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
        if row["case"] == "base" or not row["verdicts"] or Forgotten.name in row["verdicts"][-1]:
            continue
        value = forgotten(row, work)
        if value is not None:
            row["verdicts"][-1][Forgotten.name] = value
            print(row["subject"], row["seed"], row["case"], f"{value:.2f}", flush=True)
    write_text(ROWS, "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))


if __name__ == "__main__":
    main()
