"""The verdict on the page: a sentence, what to do, and the curves that it stands on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from finetune.verdicts.advice import Means
from finetune.verdicts.registry import MEASURES
from finetune.verdicts.rows import FILE, Row, read_rows, up_to
from finetune.verdicts.rules import GOOD, judged
from finetune.verdicts.verdict_file import missing, read_remarks

CHARTS = {  # title -> (measures, the unit in words)
    "what it learned": (("learned", "held_out", "overfit"), "better than the base, in effects of the prompt"),
    "what else it changed": (
        ("class_drift", "takeover", "elsewhere", "empty_prompt"),
        "distance from the base, in effects of the prompt",
    ),
}
STROKES = ("", "7 4", "2 4", "11 3 2 3")  # so that lines differ without colours too
TINTS = ("var(--mark)", "var(--good)", "var(--bad)", "var(--soft)")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 960, 200, 70, 24, 26


def verdict_section(run: Path, step: int | None, means: Means) -> str:
    """Returns the section as HTML, up to a step; empty for a run that was not measured."""
    rows = up_to(read_rows(run / FILE), step)
    verdict = judged(rows, means=means)
    if not verdict.found:
        return ""
    colour = "good" if verdict.word == GOOD else "bad"
    best = "The last step is the best of those measured." if verdict.step == rows[-1].step else ""
    remarks = [*(read_remarks(run) if step is None else []), *(missing(rows) if step is not None else [])]
    charts = "".join(_chart(title, unit, names, rows) for title, (names, unit) in CHARTS.items())
    said = " ".join(escape(text) for text in (verdict.sentence, verdict.advice, best) if text)
    return (
        f'<h2>The verdict</h2><div class=card><p><b class="{colour}">{escape(", ".join(verdict.found).capitalize())}'
        f"</b> after step {rows[-1].step}. {said}</p>{charts}{_meanings(rows)}"
        f"<p class=soft>{escape(' '.join(remarks))} Measured in the model's own space, against the base, in units of "
        "the base's own effect of prompts (docs/verdicts.md). It is no judge of how an image looks.</p></div>"
    )


def _meanings(rows: Sequence[Row]) -> str:
    held = {name for row in rows for name in row.values}
    order = [name for names, _ in CHARTS.values() for name in names]
    listed = [name for name in (*order, *(other for other in MEASURES if other not in order)) if name in held]
    cells = "".join(
        f"<tr><td>{escape(MEASURES[name].title)}</td>"
        f'<td style="white-space:nowrap">{rows[-1].values.get(name, float("nan")):.2f}</td>'
        f"<td class=soft>{escape(MEASURES[name].meaning)}</td></tr>"
        for name in listed
        if name in MEASURES
    )
    return f"<table>{cells}</table>" if cells else ""


def _chart(title: str, unit: str, names: Sequence[str], rows: Sequence[Row]) -> str:
    lines = {name: [(row.step, row.values[name]) for row in rows if name in row.values] for name in names}
    drawn = {name: points for name, points in lines.items() if len(points) > 1}
    return _plot(title, unit, drawn) if drawn else ""


def _plot(title: str, unit: str, lines: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Several lines over the steps as inline SVG, with the ends of both axes and a legend."""
    values = [value for points in lines.values() for _, value in points]
    last = max(step for points in lines.values() for step, _ in points)
    low, high = min(0.0, *values), max(1e-3, *values) * 1.05
    base = HEIGHT - BOTTOM

    def place(step: float, value: float) -> str:
        x = LEFT + step / max(1, last) * (WIDTH - LEFT - 10)
        return f"{x:.1f},{TOP + (1 - (value - low) / (high - low)) * (base - TOP):.1f}"

    drawn, legend, x = [], [], WIDTH - 10
    for number, (name, points) in reversed(list(enumerate(lines.items()))):
        tint, stroke, text = TINTS[number % 4], STROKES[number % 4], MEASURES[name].title
        path = " ".join(place(*point) for point in points)
        drawn.append(f'<polyline points="{path}" stroke="{tint}" stroke-width="2" stroke-dasharray="{stroke}"/>')
        legend.append(f'<text x="{x}" y="14" text-anchor="end" fill="{tint}">{escape(text)}</text>')
        end = x - 7.2 * len(text) - 4
        legend.append(
            f'<line x1="{end - 26:.0f}" x2="{end:.0f}" y1="10" y2="10" stroke="{tint}" stroke-width="2" '
            f'stroke-dasharray="{stroke}"/>'
        )
        x -= round(7.2 * len(text)) + 48
    zero = place(0, 0).split(",")[1]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'aria-label="{escape(title)}: {escape(unit)}"><g fill="none" stroke="var(--line)">'
        f'<line x1="{LEFT}" y1="{zero}" x2="{WIDTH - 10}" y2="{zero}"/>'
        f'<line x1="{LEFT}" y1="{TOP}" x2="{LEFT}" y2="{base}"/></g>'
        f'<g fill="none">{"".join(drawn)}</g><g font-size="12">{"".join(legend)}</g>'
        f'<g fill="var(--soft)" font-size="12"><text x="0" y="14">{escape(title)}</text>'
        f'<text x="{LEFT - 8}" y="{TOP + 8}" text-anchor="end">{high:.2g}</text>'
        f'<text x="{LEFT - 8}" y="{base}" text-anchor="end">{low:.2g}</text><text x="{LEFT}" y="{HEIGHT - 8}">0</text>'
        f'<text x="{WIDTH - 10}" y="{HEIGHT - 8}" text-anchor="end">step {last}</text></g></svg>'
    )
