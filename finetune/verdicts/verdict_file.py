"""RUN/verdict.json: the verdict on a finished run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetune.core.errors import BadInput
from finetune.core.files import write_json
from finetune.core.reading import read_json
from finetune.core.records import check_schema
from finetune.verdicts.memorisation import Memorisation
from finetune.verdicts.registry import MEASURES
from finetune.verdicts.rows import Row
from finetune.verdicts.rules import RunVerdict

FILE = "verdict.json"
SCHEMA = 1


def write_verdict(
    run: Path, verdict: RunVerdict, last: Row, memorisation: Memorisation | None, left_out: Sequence[str]
) -> None:
    """`last`: the row that it is about; `left_out`: sentences about what could not be measured."""
    drawn = {} if memorisation is None else {"sentence": memorisation.sentence, **asdict(memorisation)}
    values: dict[str, Any] = {"schema": SCHEMA, **asdict(verdict), "measures": dict(last.values)}
    write_json(run / FILE, values | {"memorisation": drawn, "left_out": list(left_out)})


def read_remarks(run: Path) -> list[str]:
    """What RUN/verdict.json says beside the rows: of copies, and of what was left out; nothing where it is damaged.

    Raises:
        LaterVersion: a later version wrote it.
    """
    file = run / FILE
    if not file.is_file():
        return []
    try:
        held = read_json(file, dict)
    except BadInput:
        return []
    check_schema(held.get("schema", 0), file, SCHEMA)
    copies, left_out = held.get("memorisation"), held.get("left_out")
    said = [copies.get("sentence")] if isinstance(copies, dict) else []
    said += left_out if isinstance(left_out, list) else []
    return [text for text in said if isinstance(text, str)]


def missing(rows: Sequence[Row]) -> list[str]:
    """A sentence for each measure that the rows do not hold."""
    held = {name for row in rows for name in row.values}
    classless = "the run has no class noun and no captions without its trigger"
    reasons = {
        "class_drift": classless,
        "takeover": classless,
        "empty_class": f"{classless}, or an older version measured it",
        "forgotten": "the run is too short for its time to pay for it, or an older version measured it",
    }
    return [
        f"“{kind.title}” was not measured: {reasons.get(name, 'the run has nothing to measure it with')}."
        for name, kind in MEASURES.items()
        if rows and name not in held
    ]
