"""RUN/report.html: one page about a run, made only from the run folder. It loads nothing from the network."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from finetune.core.errors import BadInput
from finetune.core.files import write_text
from finetune.core.records import checks_of
from finetune.export.settings import UNCHECKED
from finetune.report.look import STYLE
from finetune.report.pictures import OTHER_IMAGES, class_image_tags, input_tags, photo_tags, row
from finetune.report.strip import over_the_steps
from finetune.report.styles import with_and_without
from finetune.report.verdict_section import verdict_section
from finetune.report.why import loss_by_timestep, pictures_of_why
from finetune.runs.exports import read_exports
from finetune.runs.folder import RunFolder
from finetune.runs.inputs import read_inputs
from finetune.runs.metrics import read_metrics
from finetune.runs.record import RunRecord
from finetune.verdicts.advice import Means, means_of

# even if a value from a run's files injected markup, the page would run no script and load nothing
POLICY = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
)

CHECK = {  # what was learned -> what to look at
    "word": "Check two things: the subject looks like the photos; it is where the prompt puts it.",
    "subject": "Check three things: the subject looks like the photos; it is where the prompt puts it; the class "
    "without the token still looks as before.",
    "style": "Check three things: with the style's words, images look like the drawings; they still show what the prompt "
    "says; prompts without these words look as before.",
}


def write_report(path: Path, with_captions: bool = False, *, step: int | None = None, out: Path | None = None) -> Path:
    """Builds the page of a run folder; whatever is missing there is left out.

    It may be passed on: it names no folders of this machine, and the captions of the photos' files only
    `with_captions`.

    Args:
        step: the page of a checkpoint: the training up to there, its previews, and what was exported from it.
        out: the file; None: RUN/report.html.
    """
    folder = RunFolder(path)
    folder.refuse_links()
    info = folder.info
    metrics = read_metrics(path / "metrics.jsonl") if (path / "metrics.jsonl").is_file() else []
    target = out or path / "report.html"
    linked = target.absolute().parent == path.absolute()  # elsewhere, a link would name folders of this machine
    sections = [
        _head(info),
        _standing(step, folder),
        _accepted(path),
        verdict_section(path, step, _means(folder, info)),
        _subject(path, info, with_captions),
        _before_after(folder, info, step, linked),
        pictures_of_why(path, info, _after(path, step), finished=step is None),
        over_the_steps(path, info, step, linked),
        _plan(info),
        with_and_without(path, info, _after(path, step)),
        _curves([row for row in metrics if step is None or row["step"] <= step]),
        loss_by_timestep(path) if step is None else "",
        _exports(path, step),
        _next_steps(path, info) if step is None else _next_steps_of(path, info, step),
    ]
    body = "\n".join(section for section in sections if section)
    title = escape(info.trigger or path.absolute().name)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{POLICY}<title>{title}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main>{body}</main></body></html>\n"
    )
    write_text(target, page)
    return target


def _means(folder: RunFolder, info: RunRecord) -> Means:
    """What the run has against drift; nothing where its recipe can't be read."""
    try:
        recipe = folder.recipe
    except BadInput:
        return Means()
    inputs = info.planned.inputs if info.planned else None
    return means_of(recipe.prior, inputs, folder.checkpoints.named_steps(), recipe.data.thing)


def _standing(step: int | None, folder: RunFolder) -> str:
    """That this is no finished run's page."""
    if step is None:
        return ""
    return f"<p>This page shows the training after <b>step {step} of {folder.recipe.run.steps}</b>.</p>"


def _accepted(path: Path) -> str:
    """Changes between the run's begin and its end that somebody accepted: the result has two origins."""
    record = read_inputs(path)
    if record is None or not record.accepted:
        return ""
    items = "".join(f"<li>after step {each.step}: {escape('; '.join(each.changes))}</li>" for each in record.accepted)
    return (
        "<h2>Changed during the run</h2><div class=card><p><b>This run continued with other inputs than it began with"
        f"</b> (<code>--accept-changes</code>):</p><ul>{items}</ul></div>"
    )


def _head(info: RunRecord) -> str:
    words = [name or "?" for name in info.names]
    title = ", ".join(f"“{escape(name)}”" for name in words)
    prompts = [info.example(name) for name in words] if info.is_style else words
    shown = " or ".join(f"<b>{escape(prompt)}</b>" for prompt in prompts)
    what = f"Write {title} in a prompt to get the style: {shown}." if info.is_style else ""
    return (
        f"<h1>{title}</h1><p class=soft>{what or f'Write {shown} in a prompt to get the subject.'} Trained on "
        f"{escape(info.public_base)} ({escape(info.family)}), {info.resolution} pixels.</p>"
    )


def _subject(path: Path, info: RunRecord, with_captions: bool) -> str:
    captions = list(dict.fromkeys(text for texts in info.captions for text in texts))[:5]
    listed = "".join(f"<li><code>{escape(text)}</code></li>" for text in captions)
    prompts = f"the first training prompts:</p><ul>{listed}</ul>"
    if info.captions_from_files and not with_captions:
        prompts = "captions from caption files are not shown here (<code>finetune report RUN --captions</code>).</p>"
    small, drawn = photo_tags(path, info), class_image_tags(path)
    planned = info.planned.class_images if info.planned else None
    classes = planned.sets if planned else "some of them"
    base = f"<p class=soft>Class images, drawn by the base before training: {escape(classes)}.</p>" if drawn else ""
    return (
        f"<h2>What it learned from</h2><div class=card>{small}<p class=soft>{info.count} "
        f"{'drawings' if info.is_style else 'photos'}{_held_out(info)}; {prompts}"
        f"{base}<div class=small>{drawn}</div>{_others(path, info)}</div>"
    )


def _held_out(info: RunRecord) -> str:
    """How many of the photos were not trained on."""
    count = info.planned.verdicts.hold_out if info.planned and info.planned.verdicts else 0
    return f", of which {count} {'was' if count == 1 else 'were'} held out for the verdict" if count else ""


def _others(path: Path, info: RunRecord) -> str:
    """The first images of everything else that the run was trained on."""
    drawn = class_image_tags(path, OTHER_IMAGES)
    if not drawn:
        return ""
    planned = info.planned.others if info.planned else None
    count = f"{planned.count} images" if planned else "images"
    return (
        f"<p class=soft>Everything else: {count} that the base drew for diverse prompts and the empty one, so that it "
        f"keeps them. The first of them:</p><div class=small>{drawn}</div>"
    )


def _plan(info: RunRecord) -> str:
    rows = "".join(
        f"<tr><th>{escape(str(name))}</th><td>{escape(', '.join(map(str, value)) if isinstance(value, list) else str(value))}</td></tr>"
        for name, value in info.public_plan.items()
    )
    return f"<h2>The plan</h2><div class=card><table class=plan>{rows}</table></div>" if rows else ""


def _curves(metrics: Sequence[dict[str, float]]) -> str:
    if len(metrics) < 2:
        return ""
    steps = [row["step"] for row in metrics]
    loss = [row["loss"] for row in metrics]
    seconds = sum(row["seconds"] for row in metrics) / len(metrics)
    return (
        "<h2>Training</h2><div class=card>"
        + curve("loss", steps, loss, smooth(loss))
        + curve("learning rate", steps, [row["lr"] for row in metrics])
        + f"<p class=soft>{int(steps[-1])} steps, {seconds:.2f} s a step. Loss at a random timestep is noisy: the thick "
        "line is its running mean. The loss says little about likeness; compare the images.</p></div>"
    )


def smooth(values: Sequence[float], share: float = 0.05) -> list[float]:
    """Returns an exponential running mean over about `share` of the values, with the bias of its start corrected."""
    decay = 1 - 1 / max(2.0, share * len(values))
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        out.append(mean / weight)
    return out


def curve(title: str, steps: Sequence[float], values: Sequence[float], smoothed: Sequence[float] | None = None) -> str:
    """Returns a line plot as inline SVG, with the ends of both axes labelled."""
    width, height, left, top = 960, 190, 70, 24
    low, high = min(values), max(values)
    low, high = (min(0.0, low), max(0.0, high * 1.05) or 1.0)

    def points(line: Sequence[float]) -> str:
        span = max(1e-9, steps[-1] - steps[0])
        return " ".join(
            f"{left + (x - steps[0]) / span * (width - left - 10):.1f},"
            f"{top + (1 - (y - low) / (high - low)) * (height - top - 26):.1f}"
            for x, y in zip(steps, line, strict=True)
        )

    raw_style = 'stroke-width="1" opacity=".35"' if smoothed else 'stroke-width="2"'
    thick = f'<polyline points="{points(smoothed)}" stroke-width="2.5"/>' if smoothed else ""
    base = height - 26
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{escape(title)}">'
        f'<g fill="none" stroke="var(--line)"><line x1="{left}" y1="{base}" x2="{width - 10}" y2="{base}"/>'
        f'<line x1="{left}" y1="{top}" x2="{left}" y2="{base}"/></g>'
        f'<g fill="none" stroke="var(--mark)"><polyline points="{points(values)}" {raw_style}/>{thick}</g>'
        f'<g fill="var(--soft)" font-size="12"><text x="{left}" y="14">{escape(title)}</text>'
        f'<text x="{left - 8}" y="{top + 8}" text-anchor="end">{high:.3g}</text>'
        f'<text x="{left - 8}" y="{base}" text-anchor="end">{low:.3g}</text>'
        f'<text x="{left}" y="{height - 8}">{steps[0]:.0f}</text>'
        f'<text x="{width - 10}" y="{height - 8}" text-anchor="end">step {steps[-1]:.0f}</text></g></svg>'
    )


def _how_drawn(folder: RunFolder) -> str:
    """Sampler, steps, guidance and seeds of the images; empty for a folder without a recipe."""
    if not (folder.path / "recipe.yaml").is_file():
        return ""
    sample = folder.recipe.sample
    last = sample.seed + sample.count - 1
    seeds = f"seeds {sample.seed} to {last}" if sample.count > 1 else f"seed {sample.seed}"
    negative = f", without {sample.negative!r}" if sample.negative else ""
    return f"Drawn with {sample.sampler}, {sample.steps} steps, guidance {sample.guidance:g}, {seeds}{negative}."


def _before_after(folder: RunFolder, info: RunRecord, step: int | None, linked: bool) -> str:
    path = folder.path
    before, after = path / "samples" / "before", _after(path, step)
    if not after.is_dir():
        return ""
    rows = [_drawn_from(after, path)]
    for number, prompt in enumerate(info.prompts):
        sides = [row(side, number, path, linked) for side in (before, after)]
        rows.append(
            f"<p class=prompt>{escape(prompt)}</p><div class=pair><div><h3>before</h3><div class=row>{sides[0]}</div></div>"
            f"<div><h3>after</h3><div class=row>{sides[1]}</div></div></div>"
        )
    click = " Click an image for its full size." if linked else ""
    return (
        f"<h2>Before and after</h2><p class=soft>The same prompts at the same seeds. {escape(_how_drawn(folder))}{click} "
        f"{_check(info)}</p>"
        f"<div class=card>{''.join(rows)}</div>"
    )


def _check(info: RunRecord) -> str:
    """What to look at in the images: the class without the token only where a prompt has none."""
    tokens = [subject.token for subject in info.subjects] or [info.token]
    plain = any(not any(token and token in prompt for token in tokens) for prompt in info.prompts)
    return CHECK["style" if info.is_style else "subject" if plain else "word"]


def _drawn_from(folder: Path, run: Path) -> str:
    """What the base has read besides the prompts, where it reads anything."""
    read = input_tags(folder, run)
    return f"<p class=prompt>All of them are drawn from</p><div class=row>{read}</div>" if read else ""


def _after(path: Path, step: int | None) -> Path:
    """The folder with the images after training, or after a step of it."""
    return path / "samples" / ("after" if step is None else f"step-{step:06d}")


def _exports(path: Path, step: int | None) -> str:
    listed = read_exports(path, None if step is None else path / "exports" / f"step-{step:06d}" / "exports.json")
    if not listed:
        return ""
    rows = []
    for item in listed:
        checks = "<br>".join(
            f'<span class="{"good" if check.passed else "bad"}">{escape(check.line)}</span>'
            for check in checks_of(item)
        )
        size = item["size"] / 1e6
        rows.append(
            f"<tr><td title=format>{escape(item['format'])}</td><td title=file><code>{escape(item['path'])}</code></td>"
            f"<td title=size>{size:.2f} MB</td><td title=for>{'<br>'.join(escape(line) for line in _readers(item))}</td>"
            f"<td title=checks>{checks or UNCHECKED}</td></tr>"
        )
    head = "<tr><th>format</th><th>file</th><th>size</th><th>for</th><th>checks</th></tr>"
    return f"<h2>Files for other programs</h2><div class=card><table>{head}{''.join(rows)}</table></div>"


def _readers(item: dict[str, Any]) -> list[str]:
    """The programs that read a file, then a line for each that is known not to."""
    return [line for line in (", ".join(item["read_by"]), *item.get("limits", [])) if line]


def _a_format(path: Path) -> str:
    """A format for the example command: kohya, or the first format that was written."""
    listed = [item["format"] for item in read_exports(path)]
    return "kohya" if "kohya" in listed or not listed else listed[0]


def _typed(text: str) -> str:
    """Text quoted for a shell, because users paste it: a token from somebody else could contain shell commands."""
    return shlex.quote(text) if set(text) & set('"$`\\!\n') else f'"{text}"'


def _shell_name(path: Path) -> str:
    """A run in a command: a page may be passed on, so no folders of this machine are in it."""
    return shlex.quote(path.as_posix() if path.parent == Path("runs") else path.absolute().name)


def _prompt(info: RunRecord) -> str:
    """A prompt for a command, with the options for what else the base must be given."""
    edits = info.reads == ["image"]
    text = f"make it {info.names[0]}" if edits else info.example(info.names[0])
    read = [name for name in ("image", "mask", "depth") if name in info.reads]
    return _typed(text) + "".join(f" --{name} {name}.png" for name in read)


def _next_steps_of(path: Path, info: RunRecord, step: int) -> str:
    """What can be done with a checkpoint."""
    run, prompt = _shell_name(path), _prompt(info)
    commands = (
        "# pictures of this step",
        f"finetune sample {run} --step {step} -p {prompt}",
        "# files for other programs",
        f"finetune export {run} --step {step}",
        "# go on to the end",
        f"finetune resume {run}",
    )
    return f"<h2>Go on</h2><pre tabindex=0>{escape(chr(10).join(commands))}</pre>"


def _next_steps(path: Path, info: RunRecord) -> str:
    run = _shell_name(path)
    longer = ("# continue, or train longer", f"finetune train {run}/recipe.yaml run.dir={run} run.steps=N")
    commands = "\n".join(
        (
            "# more images",
            f"finetune sample {run} -p {_prompt(info)} --count 8",
            "# write the exports again, or in another format",
            f"finetune export {run} --to {_a_format(path)}",
            *(longer if RunFolder(path).can_be_longer else ()),
        )
    )
    places = (
        "The kohya file (<code>NAME.safetensors</code>) goes to <code>ComfyUI/models/loras</code>, <code>stable-diffusion-webui/models/Lora</code> (A1111, "
        "Forge, sdnext) or InvokeAI's model manager. Use it with the base that it was trained on."
        if _a_format(path) != "embedding"
        else "The embedding goes to <code>ComfyUI/models/embeddings</code> or <code>stable-diffusion-webui/embeddings</code> "
        "(A1111, Forge). Use the file's name as the word in prompts (<code>embedding:NAME</code> in ComfyUI)."
    )
    return f"<h2>Next steps</h2><pre tabindex=0>{escape(commands)}</pre><p class=soft>{places}</p>"
