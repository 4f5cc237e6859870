"""The page of `finetune evaluate`: the numbers of all sources side by side, then their images, prompt by prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from finetune.core.files import write_text
from finetune.data.decoding import BadImage, open_image
from finetune.evaluation.base import Pictures
from finetune.report.html import POLICY
from finetune.report.look import STYLE
from finetune.report.pictures import image_tag

SHOWN = 4  # images of each prompt and source
PHOTOS = 12
OWN = """
.best{font-weight:700}.numbers td,.numbers th{padding-right:22px}
.numbers small{color:var(--soft);display:block;white-space:nowrap}
.sources{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:6px 18px}
.sources h3{font-size:13px;color:var(--soft);margin:6px 0;font-weight:600;overflow-wrap:anywhere}
.sources .row img{width:calc(25% - 8px)}
.numbers th{white-space:normal}dt{font-weight:600;margin-top:10px}dd{margin:2px 0 0}
"""


def number(value: float | None) -> str:
    """A value with as many digits as can be compared."""
    if value is None:
        return "–"
    return f"{value:.3f}" if 0.001 <= abs(value) < 100 or value == 0 else f"{value:.3g}"


def best_of(metric: Mapping[str, Any]) -> set[str]:
    """The sources with the best value, where there are several; all that look alike in the digits that are shown."""
    values = {item["source"]: item["value"] for item in metric["values"] if item["value"] is not None}
    if len(values) < 2:
        return set()
    best = number((max if metric["higher_is_better"] else min)(values.values()))
    alike = {name for name, value in values.items() if number(value) == best}
    return set() if len(alike) == len(values) else alike


def write_page(target: Path, values: Mapping[str, Any], pictures: Sequence[Pictures], photos: Sequence[Path]) -> None:
    """Writes the page. It loads nothing, and names no folders of this machine.

    Args:
        target: the page's file.
        values: what is in evaluation.json.
        pictures: the images of each source, in the order of `values`.
        photos: the photos that they were compared with.
    """
    names = [item["name"] for item in values["sources"]]
    sections = [
        _head(values, names),
        _photos(photos),
        _table(values),
        _notes(values),
        _meanings(values),
        _images(pictures),
        _how(values),
    ]
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{POLICY}<title>Evaluation</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}{OWN}</style></head>'
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )
    write_text(target, page)


def _head(values: Mapping[str, Any], names: Sequence[str]) -> str:
    return (
        f"<h1>Evaluation</h1><p class=soft>{escape(', '.join(names))}: compared with {values['photos']['count']} "
        f"{'drawings' if values['kind'] == 'style' else 'photos'}.</p>"
    )


def _notes(values: Mapping[str, Any]) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in values["notes"])
    return f"<h2>Notes</h2><ul>{notes}</ul>" if notes else ""


def _photos(photos: Sequence[Path]) -> str:
    return f"<h2>Compared with</h2><div class='card small'>{''.join(map(_tag, photos[:PHOTOS]))}</div>"


def _table(values: Mapping[str, Any]) -> str:
    names = [item["name"] for item in values["sources"]]
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", "photos with each other", *names))
    rows = []
    for metric in values["metrics"]:
        best = best_of(metric)
        cells = "".join(_cell(item, item["source"] in best) for item in metric["values"])
        direction = "higher is better" if metric["higher_is_better"] else "lower is better"
        rows.append(
            f"<tr><td title=metric><b>{escape(metric['title'])}</b><small>{direction}</small></td>"
            f'<td title="photos with each other">{number(metric["reference"])}</td>{cells}</tr>'
        )
    return (
        "<h2>Numbers</h2><p class=soft>Mean, and below it the interval that holds it in 95 % of resamples of the "
        "prompts (PRES: of the images). It says nothing of other subjects, seeds or trainings.</p>"
        f"<div class=card><table class=numbers><tr>{head}</tr>{''.join(rows)}</table></div>"
    )


def _cell(item: Mapping[str, Any], best: bool) -> str:
    shown = number(item["value"])
    span = f"<small>{number(item['low'])} to {number(item['high'])}</small>" if item["low"] is not None else ""
    extra = "".join(f"<small>{escape(name)}: {number(value)}</small>" for name, value in item["extra"].items())
    note = f"<small style='white-space:normal'>{escape(item['note'])}</small>" if item["note"] else ""
    mark = " class=best" if best else ""
    return f'<td title="{escape(item["source"])}"><span{mark}>{shown}</span>{span}{extra}{note}</td>'


def _meanings(values: Mapping[str, Any]) -> str:
    items = "".join(
        f"<dt>{escape(metric['title'])}</dt><dd>{_sentence(metric['meaning'])} <span class=soft>But: "
        f"{escape(metric['blind'])}. ({escape(metric['source'])})</span></dd>"
        for metric in values["metrics"]
    )
    return f"<h2>What they mean</h2><div class=card><dl>{items}</dl></div>"


def _sentence(text: str) -> str:
    return escape(f"{text[:1].upper()}{text[1:]}.")


def _images(pictures: Sequence[Pictures]) -> str:
    """Prompts that differ only in the token share a row."""
    rows: dict[tuple[str, str], list[tuple[str, Sequence[Path]]]] = {}
    for item in pictures:
        for prompt, files in zip(item.prompts, item.files, strict=True):
            rows.setdefault((prompt.plain, prompt.group), []).append((item.name, files))
    shown = "".join(
        f"<p class=prompt>{escape(plain)}{_of(group)}</p><div class=sources>{_sides(own)}</div>"
        for (plain, group), own in rows.items()
    )
    return (
        f"<h2>Images</h2><p class=soft>The prompts without the token; the first {SHOWN} images of each.</p>"
        f"<div class=card>{shown}</div>"
    )


def _of(group: str) -> str:
    return " <span class=soft>(the class alone)</span>" if group == "class" else ""


def _sides(own: Sequence[tuple[str, Sequence[Path]]]) -> str:
    return "".join(
        f"<div><h3>{escape(name)}</h3><div class=row>{''.join(map(_tag, files[:SHOWN]))}</div></div>"
        for name, files in own
    )


def _tag(file: Path) -> str:
    try:
        return image_tag(open_image(file), file.name)
    except BadImage as fault:
        return f"<p class=soft>{escape(file.name)} can't be shown ({escape(fault.reason)})</p>"


def _how(values: Mapping[str, Any]) -> str:
    rows = [
        (f"network: {kind}", f"{held['name']}, SHA-256 {held['sha256']}") for kind, held in values["backbones"].items()
    ]
    rows += [(source["name"], _told(source)) for source in values["sources"]]
    rows.append(("packages", ", ".join(f"{name} {found}" for name, found in values["versions"].items())))
    listed = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows)
    return f"<h2>How it was measured</h2><div class=card><table class=plan>{listed}</table></div>"


def _told(source: Mapping[str, Any]) -> str:
    count = sum(len(prompt["images"]) for prompt in source["prompts"])
    images = f"{count} images of {len(source['prompts'])} prompts"
    if source["kind"] == "images":
        return f"{images}, as they were in the folder"
    sampling = source["sampling"]
    words = source.get("words") or source["style"] or f"{source['token']} {source['class_noun']}"  # older: no words
    step = "" if source["step"] is None else f", step {source['step']}"
    base, trained = source["base_hash"][:16], source["digest"][:16]
    return (
        f"{images}; {source['kind']}{step}, called “{words}”, strength {source['weight']:g}, on {source['base']} "
        f"(SHA-256 {base}…), trained SHA-256 {trained}…; {sampling['sampler']}, {sampling['steps']} steps, guidance "
        f"{sampling['guidance']:g}, {sampling['size']} pixels, {source['dtype']}"
    )
