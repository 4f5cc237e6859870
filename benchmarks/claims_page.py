"""The tables of dreambooth_claims.py, from its stored rows, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from claims_cases import (
    CLASS_TEACHER,
    DEFAULT,
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
from claims_measure import COLUMNS, SHORT, UNSEEN, derive
from looks import BALLS, DEVELOPMENT, FOR_DEVELOPMENT, HELD_OUT, MOONS

PAGE = Path(__file__).parents[1] / "docs" / "results.md"
BEGIN, END = "<!-- claims -->", "<!-- end of claims -->"
BESIDE = {
    "Methods": METHODS[1:],
    "Earlier defaults": EARLIER_DEFAULTS,
    "The LoRA's priors": PRIORS,
    "The LoRA's priors with mirrored photos": EARLIER_PRIORS,
    "Full fine-tuning's priors": (METHODS[1], *FULL_PRIORS),
    "Peers' settings": PEERS,
}
LISTS = (
    ("What each lever gave, on development subjects", LEVERS, tuple(DEVELOPMENT)),
    ("Small logos whose left and right are not alike, on cars made for development", SMALL_LOGOS, tuple(MOONS)),
    ("The prior's images: how many, and what they aim at", PRIOR_IMAGES, FAINT_LOGOS),
    ("The frozen base as the class's teacher", CLASS_TEACHER, tuple(FOR_DEVELOPMENT)),
    ("The same on balls alone", CLASS_TEACHER, tuple(BALLS)),
    ("Runs made to be bad", FAULTS, tuple(DEVELOPMENT)),
)
LIKE_WITH_LIKE = (SMALL_LOGOS, PRIOR_IMAGES, CLASS_TEACHER)  # of the subjects that all of their cases have
Row = dict[str, Any]
Rows = dict[tuple[str, int, str, str], Row]
Pairs = set[tuple[str, int]]  # (subject, seed)
Runs = dict[str, list[dict[str, float]]]  # by subject, the columns of each of its runs
# what the default recipe should reach on held-out subjects: column, at least (or at most), bound
BOUNDS = (
    ("gain", "≥", 0.85),
    ("details right", "≥", 0.8),
    *[(f"{place}: drawn", "≥", 0.9) for place in UNSEEN],
    *[(f"{place}: the subject", "≥", 0.85) for place in UNSEEN],
    ("“a noun” is the subject", "≤", 0.03),
    ("own class", "≥", 0.95),
    ("others", "≥", 0.97),
    ("diversity", "≥", 0.95),
)


def derived(rows: Rows, case: str, pairs: Pairs, overrides: str = "") -> Runs:
    """The columns of every run of a case that is among the pairs, by subject."""
    found: Runs = {}
    for (subject, seed, name, changed), row in rows.items():
        base = rows.get((subject, seed, "base", ""))
        if (name, changed) == (case, overrides) and (subject, seed) in pairs and base is not None:
            reference = base if case == "base" else row | {"real_likeness": base["real_likeness"]}
            found.setdefault(subject, []).append(derive(reference, base))
    return found


def pairs_of(rows: Rows, case: str, overrides: str = "") -> Pairs:
    """The (subject, seed) of the runs of a case."""
    return {(subject, seed) for subject, seed, name, changed in rows if (name, changed) == (case, overrides)}


def interval(by_subject: Runs, column: str, rounds: int = 2000) -> tuple[float, float]:
    """A 95 % bootstrap interval of the mean: subjects are drawn with replacement, each with all of its runs."""
    means = np.array([np.mean([run[column] for run in runs]) for runs in by_subject.values()])
    draws = np.random.default_rng(0).integers(0, len(means), (rounds, len(means)))
    low, high = np.percentile(means[draws].mean(1), [2.5, 97.5])
    return float(low), float(high)


def mean(by_subject: Runs, column: str) -> float:
    """The mean over subjects of the means over their runs."""
    return float(np.mean([np.mean([run[column] for run in runs]) for runs in by_subject.values()]))


def tables(rows: Rows, overrides: str = "") -> str:
    """Markdown: the default recipe's bounds and each held-out subject; methods, priors and peers' settings; then what
    development subjects said."""
    held_out = {pair for pair in pairs_of(rows, DEFAULT, overrides) if pair[0] in HELD_OUT}
    default = derived(rows, DEFAULT, held_out, overrides)
    parts = []
    if default:
        runs = f"{sum(map(len, default.values()))} runs of {len(default)} subjects"
        parts += [f"**The default recipe (`lora`) on held-out subjects** ({runs})", "\n".join(_bounds(default))]
        parts += ["**Each held-out subject, default recipe**", "\n".join(_each(default))]
    for title, cases in BESIDE.items():
        parts += _side_by_side(rows, title, cases, overrides)
    for title, cases, subjects in LISTS:
        shown = (
            subjects
            if cases not in (SMALL_LOGOS, PRIOR_IMAGES, CLASS_TEACHER)
            else _in_all(rows, cases, subjects, overrides)
        )
        lines = _listed(rows, cases, shown, overrides)
        parts += [f"**{title}**", "\n".join(lines)] if lines else []
    return "\n\n".join(parts)


def _side_by_side(rows: Rows, title: str, cases: Sequence[Case], overrides: str) -> list[str]:
    """A column for each case, of the held-out runs that all of them have: like is compared with like."""
    there = {case.name: pairs_of(rows, case.name, overrides) for case in (*METHODS[:1], *cases)}
    shown = {name: pairs for name, pairs in there.items() if pairs}
    common = {pair for pair in set.intersection(*shown.values()) if pair[0] in HELD_OUT} if shown else set()
    if len(shown) < 2 or not common:
        return []
    found = {name: derived(rows, name, common, "" if name == "base" else overrides) for name in ("base", *shown)}
    lines = [f"| | {' | '.join(found)} |", "|---" * (len(found) + 1) + "|"]
    lines += [f"| {column} | {' | '.join(_cell(runs, column) for runs in found.values())} |" for column in COLUMNS]
    subjects = ", ".join(sorted({subject for subject, _ in common}))
    return [f"**{title}** ({len(common)} held-out runs of each: {subjects})", "\n".join(lines)]


def _listed(rows: Rows, cases: Sequence[Case], subjects: Sequence[str], overrides: str) -> list[str]:
    """A row for each case on development subjects, with the columns that matter most."""
    lines = [f"| case | subjects | {' | '.join(SHORT)} |", "|---" * (len(SHORT) + 2) + "|"]
    for name in dict.fromkeys(("base", DEFAULT, *(case.name for case in cases))):
        changed = "" if name == "base" else overrides
        pairs = {pair for pair in pairs_of(rows, name, changed) if pair[0] in subjects}
        found = derived(rows, name, pairs, changed)
        if found:
            cells = " | ".join(_plain(found, column) for column in SHORT)
            lines.append(f"| {name} | {', '.join(sorted(found))} | {cells} |")
    return lines if len(lines) > 4 else []


def _in_all(rows: Rows, cases: Sequence[Case], subjects: Sequence[str], overrides: str) -> list[str]:
    """The subjects on which every case was run, for a table that is read from row to row."""
    run = [{subject for subject, _ in pairs_of(rows, case.name, overrides)} for case in cases]
    return [subject for subject in subjects if all(subject in each for each in run)]


def _plain(found: Runs, column: str) -> str:
    return f"{mean(found, column):.{0 if column == 'CPU-s' else 2}f}"


def _cell(found: Runs, column: str) -> str:
    digits = 0 if column == "CPU-s" else 2
    value, (low, high) = mean(found, column), interval(found, column)
    return f"{value:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})" if len(found) > 1 else f"{value:.{digits}f}"


def _bounds(found: Runs) -> list[str]:
    lines = ["| | measured | 95 % interval | wanted | | real images |", "|---|---|---|---|---|---|"]
    for column, sign, bound in BOUNDS:
        value, (low, high) = mean(found, column), interval(found, column)
        held = value >= bound if sign == "≥" else value <= bound
        real = f"{mean(found, f'{column}, real'):.2f}" if column.endswith(": the subject") else ""
        lines.append(_bound(column, f"{sign} {bound}", held, (value, low, high)) + f" {real} |")
    column = "“” own class, more than the base"
    value, (low, high) = mean(found, column), interval(found, column)
    lines.append(_bound(column, "an interval around 0", low <= 0 <= high, (value, low, high)) + " |")
    return lines


def _bound(column: str, wanted: str, held: bool, figures: tuple[float, float, float]) -> str:
    value, low, high = figures
    said = "holds" if held else "**does not hold**"
    return f"| {column} | {value:.2f} | {low:.2f}–{high:.2f} | {wanted} | {said} |"


def _each(found: Runs) -> list[str]:
    names = sorted(found)
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for column in COLUMNS:
        lines.append(f"| {column} | {' | '.join(_plain({name: found[name]}, column) for name in names)} |")
    return lines


def line(row: Row, rows: Rows) -> str:
    """One run, for the console."""
    base = rows.get((row["subject"], row["seed"], "base", ""))
    if base is None or row["case"] == "base":
        return f"{row['subject']} {row['seed']} {row['case']}"
    figures = derive(row | {"real_likeness": base["real_likeness"]}, base)
    return f"{row['subject']} {row['seed']} {row['case']} " + ", ".join(f"{k} {v:.2f}" for k, v in figures.items())


def write(text: str) -> None:
    """Replaces the text between the markers in docs/results.md."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8", newline="\n")
