"""Measures three kinds of prior preservation on the tiny base: LoRA with each prior at several weights.

    python benchmarks/priors.py                      # all runs, as in docs/methods.md, and their means
    python benchmarks/priors.py --subjects mug --settings "frozen_base 3"      # a trial

Subjects, recipe, judge and measurements come from dreambooth_claims.py. Finished runs are kept under --work.
"""

from __future__ import annotations

import argparse
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import dreambooth_claims as claims

SETTINGS = (
    "none",
    "class_images 1",
    "frozen_base 1",
    "frozen_base 3",
    "distance 1e-4",
    "distance 1e-3",
    "distance 1e-2",
)
SUBJECTS, SEEDS = ("mug", "car"), (0,)
SMALL = {"distance": ("export.dtype=fp32",)}  # it makes some modules' changes too small for fp16


def one_run(work: Path, subject: str, seed: int, setting: str) -> dict[str, Any]:
    prior, _, weight = setting.partition(" ")
    overrides = (f"prior.weight={weight}", *SMALL.get(prior, ())) if weight else ()
    return claims.one_run(work, subject, seed, "lora", prior, overrides)


def table(rows: dict[str, list[dict[str, float]]], untouched: list[dict[str, float]]) -> str:
    """A Markdown table of means ± standard deviations over subjects and seeds."""
    lines = [f"| prior | lambda | runs | {' | '.join(untouched[0])} |", "|---" * (len(untouched[0]) + 3) + "|"]
    lines.append(f"| the base, untouched | | | {' | '.join(claims._cells(untouched))} |")
    for setting, measured in rows.items():
        prior, _, weight = setting.partition(" ")
        cells = " | ".join(claims._cells(measured))
        lines.append(f"| {prior.replace('_', ' ')} | {weight} | {len(measured)} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "priors")
    parser.add_argument("--subjects", nargs="+", default=SUBJECTS, choices=claims.SUBJECTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--settings", nargs="+", default=SETTINGS, help="a kind and a weight each")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    work, pairs = arguments.work.absolute(), list(product(arguments.subjects, arguments.seeds))
    with ProcessPoolExecutor(arguments.jobs) as pool:
        started = [pool.submit(claims.base_figures, work, *pair) for pair in pairs]
        runs = {
            (pair, setting): pool.submit(one_run, work, *pair, setting)
            for setting, pair in product(arguments.settings, pairs)
        }
        bases = {pair: future.result() for pair, future in zip(pairs, started, strict=True)}
        rows: dict[str, list[dict[str, float]]] = {setting: [] for setting in arguments.settings}
        for (pair, setting), future in runs.items():
            rows[setting].append(claims.derive(future.result(), bases[pair]))
            print(*pair, setting, {key: round(value, 2) for key, value in rows[setting][-1].items()}, flush=True)
    untouched = [claims.derive(base | {"cpu_seconds": 0.0}, base) for base in bases.values()]
    print(table(rows, untouched))


if __name__ == "__main__":
    main()
