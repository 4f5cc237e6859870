"""A whole run asks the base what its images show, before and after, and the verdict says so."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune.config.load import parse_recipe
from finetune.config.recipe import Recipe
from finetune.core.errors import BadInput
from finetune.jobs import ask_images
from finetune.jobs import train as job
from finetune.jobs.ask_images import asked_of
from finetune.jobs.plan import plan
from finetune.jobs.prepare import prepare
from finetune.runs.prompts_shown import NAME, Adherence, Asked, read_adherence, write_adherence
from finetune.verdicts.adherence import LEVELS
from finetune.verdicts.rows import FILE, read_rows

PROMPTS = [
    "a photo of {token} {noun}",
    "a photo of {token} {noun} on the beach",
    "{token} {noun} at night",
    "a {noun}",
]


def recipe_of(base: Path, photos: Path, method: dict[str, Any], **changes: Any) -> Recipe:
    sections: dict[str, Any] = {
        "base": str(base),
        "data": {"photos": str(photos), "class_noun": "mug"},
        "method": method,
        "optim": {"kind": "adamw", "lr": 1e-2},
        "prior": {"kind": "none"},
        "run": {"steps": 2, "verdicts": "on"},
        "sample": {"count": 3, "steps": 2, "prompts": PROMPTS},
        "export": {"verify": "off"},
    }
    return parse_recipe(sections | changes)


@pytest.mark.parametrize(
    "method",
    [
        {"kind": "lora", "rank": 2, "parts": ["denoiser", "text_encoders"]},
        pytest.param({"kind": "full", "parts": ["denoiser", "text_encoders"]}, marks=pytest.mark.slow),
        pytest.param({"kind": "loha", "rank": 2}, marks=pytest.mark.slow),
        pytest.param({"kind": "pivotal", "rank": 2}, marks=pytest.mark.slow),
    ],
    ids=lambda method: method["kind"],
)
def test_the_base_answers_after_training_as_before(
    method: dict[str, Any], tiny_bases: dict[str, Path], photos: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Asked about the same images again, it says the same: no trained weight is at work, of any method."""
    counted: list[int] = []
    told, drawn = ask_images.helped, job.draw_samples
    monkeypatch.setattr(ask_images, "helped", lambda *given: counted.append(len(given[2])) or told(*given))

    def same(made: Any, folder: Path, title: str, **more: Any) -> None:
        if title == "After":
            shutil.copytree(folder.with_name("before"), folder)
        else:
            drawn(made, folder, title, **more)

    monkeypatch.setattr(job, "draw_samples", same)
    recipe = recipe_of(tiny_bases["sd1"], photos, method)
    planned = plan(prepare(recipe)).verdicts
    run = job.train(recipe, tmp_path / "run")
    found = read_adherence(run)
    assert found is not None
    assert (found.step, len(found.asked)) == (2, 2)
    assert all(len(values) == 3 for each in found.asked for values in (each.own, each.others, each.after))
    for each in found.asked:  # by what drew the images too, which has the export in the base's own weights
        assert each.after == pytest.approx(each.own, abs=1e-6)
    assert planned is not None
    assert planned.answers == sum(counted) * 2 * len(LEVELS) == 3 * 3 * 2 * 2 * len(LEVELS)
    write_adherence(run, found.model_copy(update={"step": 0}))
    job.resume(run)
    again = read_adherence(run)
    assert again is not None
    for each in again.asked:
        assert each.after == pytest.approx(each.own, abs=1e-6)


def test_what_the_images_do_not_show_is_in_the_verdict_and_the_page(
    tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(tiny_bases["sd1"], photos, {"kind": "lora", "rank": 2})
    run = job.train(recipe, tmp_path / "run")
    asked = read_adherence(run)
    assert asked is not None
    beach, night = (each.prompt for each in asked.asked)
    told = [
        Asked(prompt=beach, own=[1.0, 1.1, 0.9], others=[0.0, 0.1, -0.1], after=[0.2, 0.0, -0.05]),
        Asked(prompt=night, own=[1.0, 1.1, 0.9], others=[0.0, 0.1, -0.1], after=[1.0, 1.1, 0.9]),
    ]
    write_adherence(run, Adherence(step=2, asked=told))
    lines: list[str] = []
    job.resume(run, lines.append)
    assert read_rows(run / FILE)[-1].values["prompts_lost"] == pytest.approx(0.95)
    verdict = json.loads((run / "verdict.json").read_text())
    assert "overtrained" in verdict["found"]
    assert "the images do not show 95 % of what a sample prompt says" in verdict["sentence"].lower()
    assert verdict["prompts"]["lost"] == {beach: 0.95, night: 0.0}
    said = f"Look at the images of {beach!r}: they show 5% of what it says (before: 100%)."
    assert any(said in line for line in lines)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "they show 5% of what it says (before: 100%)." in page
    assert "sample prompts not followed" in page
    job.resume(run)  # nothing is added twice
    assert [row.step for row in read_rows(run / FILE)] == [0, 1, 2]
    (run / NAME).write_text('{"schema": 1, "asked": 3}')
    with pytest.raises(BadInput, match=r"adherence.json is damaged .*: remove it, the verdict then leaves it out"):
        job.resume(run)
    (run / NAME).unlink()
    job.resume(run)
    assert "prompts_lost" not in read_rows(run / FILE)[-1].values


def test_a_run_that_was_killed_before_the_base_answered_asks_it_later(
    tiny_bases: dict[str, Path], photos: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    def killed(*given: Any, **more: Any) -> None:
        raise RuntimeError("killed")

    recipe = recipe_of(tiny_bases["sd1"], photos, {"kind": "lora", "rank": 2})
    with monkeypatch.context() as patch:
        patch.setattr(job, "ask_base", killed)
        with pytest.raises(RuntimeError, match="killed"):
            job.train(recipe, tmp_path / "run")
    monkeypatch.setattr(job, "fit_job", killed)
    with pytest.raises(RuntimeError, match="killed"):
        job.resume(tmp_path / "run")
    found = read_adherence(tmp_path / "run")
    assert found is not None
    assert (found.step, len(found.asked)) == (0, 2)


def test_two_subjects_are_asked_about_apart(tiny_bases: dict[str, Path], photos: Path) -> None:
    """The other subject in a prompt is its class too, a prompt of both is asked about once, and images of the other
    subject in the same place are no images of another place."""
    prompts = ["a photo of {token}", "{token} at night", "zwx and sks at home"]
    sample = {"count": 3, "steps": 2, "prompts": prompts}
    made = prepare(recipe_of(tiny_bases["sd1"], photos, {"kind": "lora", "rank": 2}, sample=sample))
    pairs = (("zwx", "mug"), ("sks", "dog"))
    made = replace(made, subjects=[replace(made.subjects[0], token=token, noun=noun) for token, noun in pairs])
    asked = asked_of(made)
    assert [question.said for question in asked] == ["a mug at night", "a mug and a dog at home", "a dog at night"]
    drawn = {prompt: [Path(prompt)] for prompt in made.sample_prompts()}
    others = ask_images.images_of_others(made, drawn, "zwx at night")
    assert [str(image) for image in others] == ["a photo of zwx", "a photo of sks", "zwx and sks at home"]


def test_what_is_no_number_is_not_written(
    tiny_bases: dict[str, Path], photos: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    made = prepare(recipe_of(tiny_bases["sd1"], photos, {"kind": "lora", "rank": 2}))
    monkeypatch.setattr(ask_images, "_helped", lambda *given: [math.nan] * len(given[2]))
    job.draw_samples(made, tmp_path / "samples" / "before", "Before")
    job.ask_base(made, tmp_path)
    assert read_adherence(tmp_path) is None


def test_what_is_not_asked(tiny_bases: dict[str, Path], photos: Path) -> None:
    lora = {"kind": "lora", "rank": 2}
    base = tiny_bases["sd1"]
    assert len(asked_of(prepare(recipe_of(base, photos, lora)))) == 2
    for changes in (
        {"run": {"steps": 2}},
        {"run": {"steps": 2, "verdicts": "off"}},
        {"data": {"photos": str(photos), "class_noun": None, "templates": ["a {token}"]}},
        {"data": {"photos": str(photos), "trigger": "in {token} style", "templates": ["a drawing"]}},
        {"sample": {"count": 3, "steps": 2, "prompts": PROMPTS[:1]}},
    ):
        assert asked_of(prepare(recipe_of(base, photos, lora, **changes))) == []
