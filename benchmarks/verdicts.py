"""Are the verdicts on a run true? A judge's words against the verdict's, for all runs of dreambooth_claims.py.

    python benchmarks/dreambooth_claims.py      # trains and measures the runs, some of which are made to be bad
    python benchmarks/verdicts.py               # how the current rules agree; docs/verdicts.md

The judge (examples/tiny_base/judge.py) looks at images of the result. The verdict comes from the run's own measures,
which see no judge. The rules' limits (finetune/verdicts/rules.py) may be set by the development subjects alone.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from claims_measure import UNSEEN, derive, kind_of
from dreambooth_claims import stored

from finetune.verdicts.measures.prompts_lost import PromptsLost
from finetune.verdicts.rows import Row
from finetune.verdicts.rules import DAMAGED, DRIFTED, GOOD, OVERTRAINED, UNDERTRAINED, RunVerdict, judged

from looks import FOR_DEVELOPMENT  # isort: skip - examples/tiny_base, which claims_measure has put on the path

PAGE = Path(__file__).parents[1] / "docs" / "verdicts.md"
BEGIN, END = "<!-- agreement -->", "<!-- end of agreement -->"
GOOD_OR_NOT = "good or not"
AXES = (UNDERTRAINED, OVERTRAINED, DRIFTED, DAMAGED)
Found = dict[str, Any]


def truth(row: Found, base: Found) -> list[str]:
    """The words that hold, by the judge. `base`: the same figures before training."""
    columns = derive(row | {"real_likeness": base["real_likeness"]}, base)
    empty = f"empty_{kind_of(row['subject'])}"
    found = []
    if columns["gain"] < 0.5:
        found.append(UNDERTRAINED)
    if columns["gain"] >= 0.5 and min(row[f"at_{place}"] for place in UNSEEN) < 0.7:
        found.append(OVERTRAINED)  # a place where it was never photographed is forgotten
    if row["class_is_subject"] > base["class_is_subject"] + 0.25:
        found.append(DRIFTED)
    if row["others_right"] < base["others_right"] - 0.2 or row[empty] > base[empty] + 0.4:
        found.append(DAMAGED)
    return found or [GOOD]


@dataclass(frozen=True)
class Compared:
    """A run with the judge's words and the verdict's."""

    row: Found
    wanted: Sequence[str]
    said: RunVerdict

    def agrees(self, what: str) -> bool:
        """On one word, or on whether the run is good."""
        if what == GOOD_OR_NOT:
            return (list(self.wanted) == [GOOD]) == (self.said.word == GOOD)
        return (what in self.wanted) == (what in self.said.found)


def compared(rows: Sequence[Found], bases: dict[tuple[str, int], Found]) -> list[Compared]:
    return [
        Compared(
            row,
            truth(row, bases[row["subject"], row["seed"]]),
            judged([Row(int(values["step"]), values) for values in row["verdicts"]]),
        )
        for row in rows
    ]


def listed(runs: Sequence[Compared]) -> str:
    """Each run with the judge's words and the verdict's."""
    lines = ["| subject | seed | case | judge | verdict |", "|---|---|---|---|---|"]
    for run in runs:
        about = " | ".join(str(run.row[name]) for name in ("subject", "seed", "case"))
        lines.append(f"| {about} | {', '.join(run.wanted)} | {', '.join(run.said.found)} |")
    return "\n".join(lines)


def agreement(runs: Sequence[Compared]) -> str:
    """How often they agree: on each word, and on good or not; how many runs the judge calls so, how many of those the
    verdict calls so too, and how many others. Where few runs are bad, agreement alone says little: whoever never says
    the word agrees most of the time."""
    lines = ["| | development | of these, by the judge | held out | of these, by the judge |", "|---|---|---|---|---|"]
    for what in (*AXES, GOOD_OR_NOT):
        cells = []
        for tuned_on in (True, False):
            part = [run for run in runs if (run.row["subject"] in FOR_DEVELOPMENT) == tuned_on]
            name = GOOD if what == GOOD_OR_NOT else what
            cells += [_share([run.agrees(what) for run in part]), _seen(part, name)]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def by_places(rows: Sequence[Found], bases: dict[tuple[str, int], Found]) -> str:
    """Of the runs whose images were asked about: what the verdict sees by four places, by the two that the default's
    sample prompts name, and by none."""
    asked = [row for row in rows if row.get("lost_at")]
    lines = ["| sample prompts | runs | good or not | overtrained, by the judge |", "|---|---|---|---|"]
    for title, places in (("four places", UNSEEN), ("beach and snow", ("beach", "snow")), ("none", ())):
        part = compared([_asked_at(row, places) for row in asked], bases)
        held = [run for run in part if run.row["subject"] not in FOR_DEVELOPMENT]
        right = _share([run.agrees(GOOD_OR_NOT) for run in held])
        lines.append(f"| {title} | {len(held)} held out | {right} | {_seen(held, OVERTRAINED)} |")
    return "\n".join(lines)


def _asked_at(row: Found, places: Sequence[str]) -> Found:
    """The row as if its sample prompts had named these places alone."""
    lost = [value for place, value in row["lost_at"].items() if place in places]
    last = {name: value for name, value in row["verdicts"][-1].items() if name != PromptsLost.name}
    return row | {"verdicts": [*row["verdicts"][:-1], last | ({PromptsLost.name: max(lost)} if lost else {})]}


def _seen(runs: Sequence[Compared], name: str) -> str:
    """How many runs the judge calls so, how many of them the verdict sees, and how many others it calls so."""
    true = [run for run in runs if name in run.wanted]
    seen, others = (sum(name in run.said.found for run in part) for part in (true, runs))
    more = f"{others - seen} other{'s' * (others - seen != 1)}"
    return f"{len(true)} {name}, {seen} called so; and {more}"


def _share(agreed: list[bool]) -> str:
    return f"{sum(agreed)} of {len(agreed)} ({sum(agreed) / len(agreed):.0%})" if agreed else "none yet"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = stored()
    bases = {(subject, seed): row for (subject, seed, case, _), row in rows.items() if case == "base"}
    runs = [row for (_, _, case, overrides), row in rows.items() if case != "base" and not overrides]
    found = compared([row for row in runs if row["verdicts"] and (row["subject"], row["seed"]) in bases], bases)
    tables = f"{agreement(found)}\n\n{by_places([run.row for run in found], bases)}"
    print(f"{listed(found)}\n\n{tables}")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{tables}\n{END}{after}", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
