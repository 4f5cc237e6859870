"""Verdicts in a whole run: they change no bit of it, survive a kill, and choose a checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ends import metrics, weights

from finetune.config.load import dump_recipe, parse_recipe
from finetune.config.recipe import Recipe
from finetune.core.errors import BadInput
from finetune.data.crops import make_crops
from finetune.jobs import train as job
from finetune.jobs.dataset import cache_latents, held_out_photos, make_prompt_encoder, make_streams
from finetune.jobs.export import export_result
from finetune.jobs.fit import fit_job
from finetune.jobs.plan import plan
from finetune.jobs.prepare import prepare
from finetune.jobs.verdicts import _bank, _memorised, best_step, make_watch
from finetune.runs.folder import RunFolder
from finetune.runs.plan import plan_rows, shared_rows
from finetune.testing.kill import killed_at
from finetune.training.accelerate import make_accelerator
from finetune.training.checkpoint import Checkpoints, State
from finetune.verdicts.points import Predictor
from finetune.verdicts.registry import MEASURES
from finetune.verdicts.rows import FILE, read_rows


def recipe_of(base: Path, photos: Path, **changes: Any) -> Recipe:
    sections: dict[str, Any] = {
        "base": str(base),
        "data": {"photos": str(photos), "class_noun": "mug"},
        "method": {"kind": "lora", "rank": 2, "dropout": 0.2, "targets": "attention"},
        "optim": {"kind": "adamw", "lr": 1e-3},
        "run": {"steps": 4, "checkpoint_every": 2, "ema": 0.9},
        "sample": {"count": 1, "steps": 1, "prompts": ["a photo of {token} {noun}"]},
        "export": {"verify": "off", "formats": ["kohya"]},
    }
    for name, change in changes.items():
        sections[name] = sections.get(name, {}) | change
    return parse_recipe(sections)


def test_a_measured_run_is_the_run_bit_for_bit_and_goes_on_after_a_kill(
    tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    """With dropout, EMA and text encoders in training; the best step's checkpoint stays and is exported."""
    method = {"parts": ["denoiser", "text_encoders"]}
    plain = job.train(recipe_of(tiny_bases["sd1"], photos, method=method, run={"verdicts": "off"}), tmp_path / "plain")
    on = {"verdicts_every": 1, "keep_best": True, "keep": 1}
    recipe = recipe_of(tiny_bases["sd1"], photos, method=method, run=on)
    with killed_at(4):
        job.train(recipe, tmp_path / "on")
    lines: list[str] = []
    run = job.resume(tmp_path / "on", lines.append)
    assert not (plain / FILE).exists()
    assert not (plain / "verdict.json").exists()
    wanted, found = weights(plain), weights(run)
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())
    assert metrics(plain) == metrics(run)
    rows = read_rows(run / FILE)
    assert [row.step for row in rows] == [0, 1, 2, 3, 4]
    assert all(set(row.values) == set(MEASURES) - {"prompts_lost"} for row in rows)
    assert any("step 4: learned" in line for line in lines)
    status = json.loads((run / "status.json").read_text())
    verdict = json.loads((run / "verdict.json").read_text())
    assert status["verdict"] == verdict["word"]
    assert status["measures"]["learned"] == pytest.approx(rows[-1].values["learned"], abs=1e-4)
    assert "The verdict" in (run / "report.html").read_text(encoding="utf-8")
    job.resume(run)  # writes exports and page again, and measures nothing
    again = json.loads((run / "status.json").read_text())
    assert (again["verdict"], again["measures"]) == (status["verdict"], status["measures"])
    best = best_step(RunFolder(run))
    assert best in Checkpoints(run).steps()
    exported = export_result(run, ["kohya"], step=best, out=tmp_path / "best")
    assert exported[0].path.is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "optim"),
    [({"kind": "full"}, {"kind": "schedule_free"}), ({"kind": "pivotal", "rank": 2}, {}), ({"kind": "oft"}, {})],
)
def test_no_method_and_no_optimiser_notices(
    method: dict, optim: dict, tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    runs = []
    for verdicts in ("off", "on"):
        recipe = parse_recipe(
            recipe_of(tiny_bases["sdxl"], photos).model_dump(mode="json")
            | {"method": method, "optim": {"kind": "adamw", "lr": 1e-3} | optim}
            | {"run": {"steps": 3, "checkpoint_every": 2, "verdicts": verdicts}, "export": {"verify": "off"}}
        )
        runs.append(job.train(recipe, tmp_path / verdicts))
    one, other = (weights(run) for run in runs)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert metrics(runs[0]) == metrics(runs[1])
    assert [row.step for row in read_rows(runs[1] / FILE)] == [0, 1, 2, 3]


@pytest.fixture
def watch_of(tiny_bases: dict[str, Path], photos: Path) -> Any:
    def make(**changes: Any) -> tuple[Any, Any, Any]:
        prepared = prepare(recipe_of(tiny_bases["sd1"], photos, run={"verdicts": "on"}, **changes))
        streams = make_streams(prepared)
        cache = cache_latents(prepared, streams)
        encode = make_prompt_encoder(prepared, streams)
        return prepared, streams, make_watch(prepared, streams, cache, encode, True)

    return make


def test_a_photo_that_is_held_out_is_never_trained_on(watch_of: Any) -> None:
    prepared, streams, watch = watch_of(data={"hold_out": 1})
    (held,) = held_out_photos(prepared)
    assert prepared.names[held] not in {sample.name for sample in streams[0]}
    assert len(streams[0]) == len(prepared.photos) - 1
    assert watch.material is not None
    unseen = [point.noisy for point in watch.material.held_out]
    assert not any(torch.equal(point.noisy, other) for point in watch.material.photos for other in unseen)


def test_by_default_unseen_views_are_crops_that_training_does_not_have(watch_of: Any) -> None:
    prepared, streams, watch = watch_of(data={"crop": "random", "flip": True})
    assert len(streams[0]) == len(prepared.photos)
    assert [point.t for point in watch.material.photos] == [point.t for point in watch.material.held_out]
    seen, unseen = watch.material.photos, watch.material.held_out
    assert not any(torch.equal(one.noisy, other.noisy) for one in seen for other in unseen)


def test_without_a_noun_there_is_no_class(watch_of: Any) -> None:
    prepared, _, watch = watch_of(data={"class_noun": None, "templates": ["a photo of {token}"]})
    assert watch.material.classes == [(None, f"a photo of {prepared.token}")]
    styled = {"class_noun": None, "trigger": "in {token} style", "templates": ["a drawing", "a picture"]}
    prepared, _, watch = watch_of(data=styled)
    assert watch.material.classes == [
        ("a drawing", f"a drawing in {prepared.token} style"),
        ("a picture", f"a picture in {prepared.token} style"),
    ]


def test_all_photos_can_not_be_held_out(tiny_bases: dict[str, Path], photos: Path) -> None:
    with pytest.raises(BadInput, match="at least one must be left"):
        prepare(recipe_of(tiny_bases["sd1"], photos, data={"hold_out": 3}))
    with pytest.raises(BadInput, match="nothing is measured on them"):
        prepare(recipe_of(tiny_bases["sd1"], photos, data={"hold_out": 1}, run={"verdicts": "off"}))


def test_a_protected_checkpoint_stays_until_another_is_protected(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    state = State(0, {"w": torch.zeros(1)}, {})
    for step in (1, 2, 3, 4):
        kept.save(replace(state, step=step), keep=1)
        if step == 2:
            kept.protect(2)
    assert kept.steps() == [2, 4]
    kept.protect(5)
    kept.save(replace(state, step=5), keep=1)
    assert kept.steps() == [5]
    kept.save(replace(state, step=3), keep=1)  # a run that went on from an earlier one
    assert kept.steps() == [3]
    kept.protect(3)
    kept.save(replace(state, step=6), keep=1)
    assert kept.steps() == [3, 6]
    kept.protect(6)
    kept.drop_others(6, keep=1)
    assert kept.steps() == [6]
    (kept.path / "best.json").write_text("no JSON")
    assert kept.protected() == 0


def test_the_best_step_needs_verdicts_and_its_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(BadInput, match="is not a run folder"):
        best_step(folder)

    def run(**settings: Any) -> None:
        (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe_of(tmp_path, tmp_path, run=settings)))

    for settings, said in (
        ({"verdicts": "off"}, "run.verdicts is off; give a number with --step, or train with run.verdicts=on"),
        ({"verdicts": "auto"}, "it was too short for them; give a number"),
        ({"verdicts_every": 3}, "the first one comes after step 3 of 4; until then give a number with --step"),
    ):
        run(**settings)
        with pytest.raises(BadInput, match=f"has no verdicts, which choose the best step: {said}"):
            best_step(folder)
    (tmp_path / FILE).write_text('{"step": 50, "learned": 1.0, "seconds": 0.1}\n')
    with pytest.raises(BadInput, match=r"is 50, whose checkpoint was not kept \(kept: none\)"):
        best_step(folder)
    with pytest.raises(BadInput, match=r"train again with run\.keep_best=true"):
        best_step(folder)
    run(keep_best=True)
    with pytest.raises(BadInput, match=r"it is lost, though run\.keep_best is on"):
        best_step(folder)
    state = State(50, {"w": torch.zeros(1)}, {})
    folder.checkpoints.save(state, keep=1)
    assert best_step(folder) == 50
    (tmp_path / "checkpoints" / "step-000050" / "trained.safetensors").write_bytes(b"damaged")
    with pytest.raises(BadInput, match=r"the checkpoint of step 50, the best of .* is damaged \(kept: none\)"):
        best_step(folder)


def test_a_photo_is_not_held_out_of_a_run_that_is_too_short_to_be_measured(
    tiny_bases: dict[str, Path], photos: Path
) -> None:
    recipe = recipe_of(tiny_bases["sd1"], photos, data={"hold_out": 1})
    with pytest.raises(BadInput, match=r"4 steps are too few for run\.verdicts=auto"):
        prepare(recipe)
    assert prepare(recipe, begun=True).photos  # an older run goes on


def test_the_plan_says_what_is_measured_and_what_it_costs(
    tiny_bases: dict[str, Path], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of predictions is that of a real run."""
    monkeypatch.setenv("FINETUNE_CACHE", str(photos.parent / "cache"))  # where no base has drawn yet
    asked: list[int] = []
    predict = Predictor.__call__
    monkeypatch.setattr(Predictor, "__call__", lambda self, points: asked.append(len(points)) or predict(self, points))
    for data in ({"hold_out": 1}, {"class_noun": None, "templates": ["a photo of {token}"]}):
        asked.clear()
        recipe = recipe_of(tiny_bases["sd1"], photos, data=data, run={"verdicts_every": 2, "keep_best": True})
        looked = prepare(recipe)
        planned = plan(looked).verdicts
        assert planned is not None
        run = photos.parent / f"run-{len(data)}"
        run.mkdir()
        fit_job(looked, RunFolder(run), make_accelerator(recipe.run, True))
        assert sum(asked) - planned.predictions in (0, planned.drawn_once)
        assert planned.share == planned.predictions / (3 * 4)
    looked = prepare(recipe_of(tiny_bases["sd1"], photos, data={"hold_out": 1}, run={"verdicts": "on"}))
    rows, shared = plan_rows(plan(looked)), shared_rows(plan(looked))
    (held,) = held_out_photos(looked)
    assert rows["verdicts"].startswith("after steps 1, 2, 3, 4: what it learned, on 4 photos and on what is held out;")
    name = looked.names[held]
    assert rows["held out"] == f"1 of 3 photos, not trained on but used to measure what was learned: {name}"
    assert name not in shared["held out"]
    assert rows["each photo"] == "seen 2 times"


def test_an_image_like_a_photo_that_was_held_out_is_no_copy(
    tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    """ "1 of 3 images are close to copies of a training photo" was said of one that no step has seen."""
    looked = prepare(recipe_of(tiny_bases["sd1"], photos, data={"hold_out": 1}, run={"verdicts": "on"}))
    (held,) = held_out_photos(looked)
    for number, photo in enumerate(looked.photos):
        make_crops(photo, looked.resolution, "center", 1, False, 0)[0].image().save(tmp_path / f"{number:02d}-0.png")
    found = _memorised(looked, tmp_path)
    assert found is not None
    seen = [number for number in range(3) if number != held]
    assert [(item.photo, item.copied) for number, item in enumerate(found.nearest) if number in seen] == [
        (number, True) for number in seen
    ]
    assert not found.nearest[held].copied


def test_the_plan_says_that_nothing_is_measured(tiny_bases: dict[str, Path], photos: Path) -> None:
    short, off = (plan(prepare(recipe_of(tiny_bases["sd1"], photos, run=own))) for own in ({}, {"verdicts": "off"}))
    assert "too short" in plan_rows(short)["verdicts"]
    assert plan_rows(off)["verdicts"] == "none: run.verdicts is off"


def test_drawings_of_a_new_word_are_not_those_of_another_initialiser(
    tiny_bases: dict[str, Path], photos: Path
) -> None:
    """Without a class noun the word itself is drawn. `<zwx>` that begins as a mug is another word than as a car."""
    sections = {
        "base": str(tiny_bases["sd1"]),
        "data": {"photos": str(photos), "token": "zwx", "templates": ["a {token}"]},
        "prior": {"kind": "none"},
        "optim": {"kind": "adamw"},
        "run": {"steps": 4},
    }
    made_by = [
        _bank(prepare(parse_recipe({**sections, "method": {"kind": kind, "init": word}})), lambda points: []).made_by
        for kind, word in (("textual_inversion", "mug"), ("textual_inversion", "car"), ("pivotal", "mug"))
    ]
    assert made_by[0] == made_by[2] != made_by[1]
