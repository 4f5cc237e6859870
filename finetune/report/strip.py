"""The strip of previews: one grid with a row for each prompt and a column for each step, all at the same seed."""

from __future__ import annotations

from html import escape
from pathlib import Path

from finetune.report.pictures import row
from finetune.runs.record import RunRecord

PREVIEWS = 8  # steps that are shown


def over_the_steps(path: Path, info: RunRecord, step: int | None, linked: bool) -> str:
    """Returns the first image of each prompt before training, and at each step where previews were drawn; empty
    without previews. `step`: only up to there."""
    folders = sorted((path / "samples").glob("step-*"))
    numbered = [(int(folder.name[5:]), folder) for folder in folders if folder.name[5:].isdecimal()]
    shown = _some([item for item in numbered if step is None or item[0] <= step])
    if not shown:
        return ""
    columns = [("before", path / "samples" / "before"), *[(f"step {at}", folder) for at, folder in shown]]
    rows = []
    for number, prompt in enumerate(info.prompts):
        images = [(name, row(folder, number, path, linked, most=1)) for name, folder in columns]
        cells = "".join(f"<figure>{image}<figcaption>{name}</figcaption></figure>" for name, image in images)
        rows.append(f"<p class=prompt>{escape(prompt)}</p>{cells}")
    return (
        "<h2>Over the steps</h2><p class=soft>One seed for all of them: what training changes, and when.</p>"
        f'<div class=card><div class=strip style="--columns:{len(columns)}">{"".join(rows)}</div></div>'
    )


def _some(items: list[tuple[int, Path]]) -> list[tuple[int, Path]]:
    """At most PREVIEWS of them, spread evenly, with the first and the last."""
    if len(items) <= PREVIEWS:
        return items
    return [items[round(index * (len(items) - 1) / (PREVIEWS - 1))] for index in range(PREVIEWS)]
