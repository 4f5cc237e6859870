"""The verdict on the page: a sentence, what to do, and the curves that it stands on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from finetune.verdicts.advice import Means
from finetune.verdicts.registry import MEASURES
from finetune.verdicts.rows import BROKEN, FILE, Row, read_rows, up_to
from finetune.verdicts.rules import GOOD, judged, limit_of
from finetune.verdicts.verdict_file import missing, read_remarks

CHARTS = {  # title -> (measures, the unit in words)
    "what it learned": (
        ("learned", "held_out", "overfit"),
        "better than the base; 1 is the effect of a prompt in the base",
    ),
    "what else it changed": (
        ("class_drift", "takeover", "elsewhere", "empty_class", "empty_prompt"),
        "distance from the base; 1 is the effect of a prompt in the base",
    ),
    "what other prompts lost": (("forgotten",), "how much less they help to predict the base's own images"),
}
STROKES = ("", "7 4", "2 4", "11 3 2 3", "1 2")  # so that lines differ without colours too
TINTS = ("var(--mark)", "var(--good)", "var(--bad)", "var(--soft)", "var(--ink)")
HEIGHT = 150  # pixels; the width is the page's, so only lines are in the SVG, and texts keep their size on a phone
SETTINGS = re.compile(r"finetune export RUN --step \d+|(?:run|optim|prior)\.[a-z_.]*[a-z](?:=[\w.]+)?")


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
    said = " ".join(_with_code(text) for text in (verdict.sentence, verdict.advice, best) if text)
    return (
        f'<h2>The verdict</h2><div class=card><p><b class="{colour}">{escape(", ".join(verdict.found).capitalize())}'
        f"</b> after step {rows[-1].step}. {said}</p>{charts}{_meanings(rows)}"
        f"<p class=soft>{escape(' '.join(remarks))} The numbers compare the model's predictions with the "
        "base's: 1 is as much as a prompt changes the base's prediction (docs/verdicts.md). They do not judge how an "
        "image looks.</p></div>"
    )


def _with_code(text: str) -> str:
    """As HTML: commands and settings in the type of code, which is not broken at the end of a line."""
    return SETTINGS.sub(lambda found: f"<code class=whole>{found[0]}</code>", escape(text))


def _meanings(rows: Sequence[Row]) -> str:
    """Each measure with its number, which is marked where it speaks against the run, its limit, and its meaning."""
    held = {name for row in rows for name in row.values}
    order = [name for names, _ in CHARTS.values() for name in names]
    listed = [name for name in (*order, *(other for other in MEASURES if other not in order)) if name in held]
    cells = "".join(_meaning(name, rows[-1].values) for name in listed if name in MEASURES)
    return f"<table class=measures>{cells}</table>" if cells else ""


def _meaning(name: str, values: Mapping[str, float]) -> str:
    value = values.get(name)
    number = "" if value is None else f"{value:z.2f}" if abs(value) < BROKEN else "no number"
    limit = limit_of(name)
    beyond = limit is not None and value is not None and limit.broken_by(name, values)
    said = "" if limit is None else f"{'at least' if limit.least else 'at most'} {limit.value:g}"
    return (
        f"<tr><td>{escape(MEASURES[name].title)}</td><td{' class=bad' if beyond else ''}>{number}</td>"
        f"<td class=soft>{said}</td><td class=soft>{escape(MEASURES[name].meaning)}</td></tr>"
    )


def _chart(title: str, unit: str, names: Sequence[str], rows: Sequence[Row]) -> str:
    rows = [row for row in rows if all(abs(row.values.get(name, 0.0)) < BROKEN for name in names)]
    lines = {name: [(row.step, row.values[name]) for row in rows if name in row.values] for name in names}
    drawn = {name: points for name, points in lines.items() if len(points) > 1}
    return _plot(title, unit, drawn) if drawn else ""


def _plot(title: str, unit: str, lines: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Several lines over the steps as inline SVG, with the ends of both axes and a legend as texts around it."""
    values = [value for points in lines.values() for _, value in points]
    last = max(step for points in lines.values() for step, _ in points)
    low, high = min(0.0, *values), max(0.0, *values) * 1.05
    high = high if high - low > 1e-3 else low + 1e-3

    def place(step: float, value: float) -> str:
        return f"{1000 * step / max(1, last):.1f},{(1 - (value - low) / (high - low)) * HEIGHT:.1f}"

    drawn, legend = [], []
    for number, (name, points) in enumerate(lines.items()):
        tint, stroke = TINTS[number % len(TINTS)], STROKES[number % len(STROKES)]
        style = f'stroke="{tint}" stroke-width="2" stroke-dasharray="{stroke}"'
        path = " ".join(place(*point) for point in points)
        drawn.append(f'<polyline points="{path}" {style} vector-effect="non-scaling-stroke"/>')
        mark = f'<svg width="26" height="8" aria-hidden="true"><line x1="0" x2="26" y1="4" y2="4" {style}/></svg>'
        legend.append(f'<span style="color:{tint}">{mark} {escape(MEASURES[name].title)}</span>')
    zero = place(0, 0).split(",")[1]
    return (
        f"<figure class=chart><figcaption><b>{escape(title)}</b> {' '.join(legend)}</figcaption>"
        f"<div class=axis><span>{high:.2g}</span><span>{low:.2g}</span></div>"
        f'<svg class=plot viewBox="0 0 1000 {HEIGHT}" preserveAspectRatio="none" height="{HEIGHT}" role="img" '
        f'aria-label="{escape(title)}: {escape(unit)}"><line x1="0" y1="{zero}" x2="1000" y2="{zero}" '
        f'stroke="var(--line)" vector-effect="non-scaling-stroke"/><g fill="none">{"".join(drawn)}</g></svg>'
        f"<div class=steps><span>0</span><span>step {last}</span></div></figure>"
    )
