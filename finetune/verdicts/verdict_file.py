"""RUN/verdict.json: the verdict on a finished run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finetune.core.errors import BadInput
from finetune.core.files import write_json
from finetune.core.reading import read_json
from finetune.core.records import check_schema
from finetune.verdicts.changed import Change, said_of_pictures
from finetune.verdicts.memorisation import Memorisation
from finetune.verdicts.registry import MEASURES
from finetune.verdicts.rows import Row
from finetune.verdicts.rules import LIMITS, RunVerdict

FILE = "verdict.json"
SCHEMA = 1


@dataclass(frozen=True)
class SaidByImages:
    """What the drawn images say: copies of photos, and how much they changed; None where there is nothing to say.
    `lost`: the share of each prompt's words that they do not show."""

    copies: Memorisation | None
    changed: Change | None
    lost: Mapping[str, float] = field(default_factory=dict)

    @property
    def sentences(self) -> list[str]:
        said = [each.sentence for each in (self.changed, self.copies) if each is not None]
        return [sentence for sentence in (self.of_prompts, *said) if sentence]

    @property
    def of_prompts(self) -> str:
        """The prompts that are not followed; empty if all are."""
        said = [
            f"Look at the images of {prompt!r}: they show {max(0.0, 1 - share):.0%} of what it says (before: 100%)."
            for prompt, share in self.lost.items()
            if share > LIMITS.prompts_lost
        ]
        return " ".join(said)


def write_verdict(run: Path, verdict: RunVerdict, last: Row, drawn: SaidByImages, left_out: Sequence[str]) -> None:
    """`last`: the row that it is about; `left_out`: sentences about what could not be measured."""
    memorisation, changed = drawn.copies, drawn.changed
    copies = {} if memorisation is None else {"sentence": memorisation.sentence, **asdict(memorisation)}
    values: dict[str, Any] = {"schema": SCHEMA, **asdict(verdict), "measures": dict(last.values)}
    if drawn.lost:
        values["prompts"] = {"sentence": drawn.of_prompts, "lost": dict(drawn.lost)}
    if changed is not None:
        values["changed"] = {"sentence": changed.sentence, "share": changed.share}
    write_json(run / FILE, values | {"memorisation": copies, "left_out": list(left_out)})


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
    left_out = held.get("left_out")
    missed = left_out if isinstance(left_out, list) else []
    return [*said_of_pictures(held), *(text for text in missed if isinstance(text, str))]


def missing(rows: Sequence[Row]) -> list[str]:
    """A sentence for each measure that the rows do not hold."""
    held = {name for row in rows for name in row.values}
    classless = "the run has no class noun and no captions without its trigger"
    reasons = {
        "class_drift": classless,
        "takeover": classless,
        "empty_class": f"{classless}, or an older version measured it",
        "prompts_lost": "the base draws nothing that a sample prompt says beside the subject, the run is too short "
        "for its time to pay for it, or an older version measured it",
        "forgotten": "the run is too short for its time to pay for it, or an older version measured it",
    }
    return [
        f"“{kind.title}” was not measured: {reasons.get(name, 'the run has nothing to measure it with')}."
        for name, kind in MEASURES.items()
        if rows and name not in held
    ]
