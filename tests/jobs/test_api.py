"""The Python API beside the command line: several runs in one process, in threads, followed by events and ended."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_train import FULL, LORA, settings

from finetune import resume, train
from finetune.config.load import parse_recipe
from finetune.core.errors import BadInput, Stopped
from finetune.core.events import (
    CheckpointSaved,
    Event,
    ImagesDrawn,
    PhaseEnded,
    PhaseStarted,
    RunEnded,
    RunStarted,
    StepDone,
)
from finetune.core.signals import Stop


def recipe(base: Path, photos: Path, method: dict = LORA, **run: object):
    return parse_recipe(settings(base, photos, method, prior={"kind": "none"}, run={"steps": 2, **run}))


def test_two_precisions_in_one_process(tiny_bases: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    """Accelerate itself refuses a second precision."""
    for number, precision in enumerate(("bf16", "fp32", "bf16")):
        run = train(recipe(tiny_bases["sd1"], photos, FULL, precision=precision), tmp_path / str(number))
        assert (run / "report.html").is_file()
    first, again = (load_file(tmp_path / n / "adapter" / "trained.safetensors") for n in ("0", "2"))
    assert all(bool((first[name] == again[name]).all()) for name in first)


def test_a_run_is_followed_by_typed_events(tiny_bases: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    seen: list[Event] = []
    run = train(recipe(tiny_bases["sd1"], photos, checkpoint_every=1), tmp_path / "run", events=seen.append)
    steps = [event for event in seen if isinstance(event, StepDone)]
    written = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(event.step, event.loss) for event in steps] == [(row["step"], row["loss"]) for row in written]
    assert [event.step for event in seen if isinstance(event, CheckpointSaved)] == [1, 2]
    assert [event.folder.name for event in seen if isinstance(event, ImagesDrawn)] == ["before", "after"]
    assert [event.outcome for event in seen if isinstance(event, RunEnded)] == ["finished"]
    assert RunStarted(run, 2) in seen
    begun = [event.title for event in seen if isinstance(event, PhaseStarted)]
    assert begun == [event.title for event in seen if isinstance(event, PhaseEnded)]
    assert "Training" in begun
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"], status["steps"]) == ("finished", 2, 2)


@pytest.mark.slow
def test_a_run_in_a_thread_can_be_stopped_and_goes_on(
    tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    """Outside the main thread there are no signal handlers; the result is the unbroken run's, bit for bit."""
    stop, ends = Stop(), []
    whole = train(recipe(tiny_bases["sd1"], photos, steps=4), tmp_path / "whole")

    def after_two(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 2:
            stop.request()

    def work() -> None:
        made = recipe(tiny_bases["sd1"], photos, steps=4)
        with pytest.raises(Stopped):
            train(made, tmp_path / "run", events=after_two, stop=stop)
        ends.append(json.loads((tmp_path / "run" / "status.json").read_text())["state"])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ends == ["stopped"]
    resume(tmp_path / "run")
    results = [load_file(run / "adapter" / "trained.safetensors") for run in (whole, tmp_path / "run")]
    assert all(bool((results[0][name] == results[1][name]).all()) for name in results[0])


def test_a_second_run_beside_one_is_refused(tiny_bases: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    """They would share torch's seed; one after the other is fine."""
    made = recipe(tiny_bases["sd1"], photos)
    refused: list[str] = []

    def beside(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 1:
            with pytest.raises(BadInput) as caught:
                train(made, tmp_path / "beside")
            refused.append(str(caught.value))

    train(made, tmp_path / "run", events=beside)
    assert "another run is active" in refused[0]
    assert not (tmp_path / "beside").exists()
    train(made, tmp_path / "beside")


def test_previews_under_ema_show_what_leaves(tiny_bases: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    """The preview's file of the last step holds the matrices that the run's own result has."""
    sample = {"count": 1, "steps": 1, "every": 3, "prompts": ["a photo of {token} {noun}"]}
    values = settings(
        tiny_bases["sd1"], photos, LORA, prior={"kind": "none"}, run={"steps": 3, "ema": 0.5}, sample=sample
    )
    run = train(parse_recipe(values | {"export": {"dtype": "fp32"}}), tmp_path / "run")
    preview = load_file(next((run / "previews").glob("*-000003.safetensors")))
    result = load_file(next((run / "exports").glob("*.safetensors")))
    assert preview.keys() == result.keys()
    assert all(bool((preview[name] == result[name]).all()) for name in result)


def test_a_preview_that_a_stop_left_out_is_drawn_later(
    tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    """A stop is heeded after the checkpoint, before its preview: the images of that step are the unbroken run's."""
    sample = {"count": 1, "steps": 1, "every": 2, "prompts": ["a photo of {token} {noun}"]}
    values = settings(
        tiny_bases["sd1"], photos, LORA, prior={"kind": "none"}, run={"steps": 3, "ema": 0.5}, sample=sample
    )
    whole = train(parse_recipe(values), tmp_path / "whole")
    stop = Stop()

    def after_two(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 2:
            stop.request()

    with pytest.raises(Stopped):
        train(parse_recipe(values), tmp_path / "run", events=after_two, stop=stop)
    shown = Path("samples", "step-000002")
    assert not (tmp_path / "run" / shown).exists()
    resume(tmp_path / "run")
    pixels = [(run / shown / "00-0.png").read_bytes() for run in (whole, tmp_path / "run")]
    assert pixels[0] == pixels[1]
    results = [load_file(run / "adapter" / "trained.safetensors") for run in (whole, tmp_path / "run")]
    assert all(bool((results[0][name] == results[1][name]).all()) for name in results[0])


@pytest.mark.parametrize("title", ["Before", "Class images", "Latents", "After"])
def test_a_stop_is_heeded_outside_the_loop(
    title: str, tiny_bases: dict[str, Path], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a signal is: at once, and the run can go on."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    prior = {"kind": "class_images", "count": 2, "steps": 1, "batch_size": 1}
    made = parse_recipe(settings(tiny_bases["sd1"], photos, LORA, prior=prior, run={"steps": 2}))
    stop, begun = Stop(), []

    def ask(event: Event) -> None:
        if isinstance(event, PhaseStarted):
            begun.append(event.title)
            if event.title == title:
                stop.request()

    with pytest.raises(Stopped):
        train(made, tmp_path / "run", events=ask, stop=stop)
    assert begun[-1] == title
    assert status_of(tmp_path / "run")["state"] == "stopped"
    assert (resume(tmp_path / "run") / "report.html").is_file()


@pytest.mark.parametrize(
    ("kind", "outcome"), [(RunStarted, "failed"), (PhaseStarted, "failed"), (RunEnded, "finished")]
)
def test_a_consumer_that_fails_ends_the_run_and_the_others_still_hear_of_it(
    kind: type, outcome: str, tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    def fail(event: Event) -> None:
        if isinstance(event, kind):
            raise ValueError("of the consumer")

    with pytest.raises(ValueError, match="of the consumer"):
        train(recipe(tiny_bases["sd1"], photos), tmp_path / "run", events=fail)
    assert status_of(tmp_path / "run")["state"] == outcome


@pytest.mark.slow
def test_the_status_of_a_run_that_goes_on_knows_its_step(
    tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    run = train(recipe(tiny_bases["sd1"], photos), tmp_path / "run")
    assert status_of(resume(run))["step"] == 2, "a finished run has all of its steps"
    (run / "adapter" / "trained.safetensors").unlink()
    steps: list[int] = []

    def look(event: Event) -> None:
        if isinstance(event, PhaseEnded) and event.title == "Training":
            steps.append(status_of(run)["step"])

    resume(run, events=look)
    assert steps == [2], "its last checkpoint has all of them"


def status_of(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


@pytest.mark.parametrize("moment", [StepDone, ImagesDrawn])
def test_a_run_whose_folder_is_removed_ends_at_once(
    moment: type[Event], tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    """And leaves nothing that would stand in the way of a new one."""
    steps: list[int] = []

    def remove(event: Event) -> None:
        steps.extend([event.step] if isinstance(event, StepDone) else [])
        if isinstance(event, moment) and (tmp_path / "run").is_dir():
            shutil.rmtree(tmp_path / "run")

    with pytest.raises(BadInput, match="was removed or moved while its run was at work"):
        train(recipe(tiny_bases["sd1"], photos, steps=4), tmp_path / "run", events=remove)
    assert len(steps) <= 1
    assert not (tmp_path / "run").exists()
