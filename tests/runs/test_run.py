"""The run folder: checkpoints that can be trusted, recipes that may not change, metrics that rewind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from finetune.config.load import parse_recipe
from finetune.config.recipe import Recipe
from finetune.core.errors import BadInput
from finetune.core.events import Restored, StepDone
from finetune.core.files import save_tensors
from finetune.runs.folder import RunFolder, next_folder
from finetune.runs.metrics import MetricsFile, read_metrics
from finetune.training.checkpoint import State


def recipe(photos: Path, **run: object) -> Recipe:
    return parse_recipe(
        {"data": {"photos": str(photos), "class_noun": "mug"}, "method": {"kind": "lora"}, "optim": {"kind": "adamw"},
         "run": run}
    )  # fmt: skip


def take(folder: RunFolder, recipe: Recipe) -> None:
    with folder.held(recipe):
        pass


def state(step: int) -> State:
    return State(step, {"denoiser.x": torch.full((4,), float(step))}, {"0/step": torch.tensor(step)}, {}, {"a": 1})


@pytest.fixture
def folder(tmp_path: Path, photos: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    take(run, recipe(photos))
    return run


def test_a_recipe_comes_back_as_it_was(folder: RunFolder, photos: Path) -> None:
    assert folder.recipe == recipe(photos)


def test_a_checkpoint_comes_back_as_it_was(folder: RunFolder) -> None:
    folder.checkpoints.save(state(5), keep=2)
    found = folder.checkpoints.latest()
    assert found is not None
    assert found.step == 5
    assert torch.equal(found.trained["denoiser.x"], torch.full((4,), 5.0))
    assert int(found.optimizer["0/step"]) == 5
    assert found.values == {"a": 1}


def test_only_the_newest_are_kept(folder: RunFolder) -> None:
    for step in (1, 2, 3):
        folder.checkpoints.save(state(step), keep=2)
    assert [path.name for path in sorted((folder.path / "checkpoints").iterdir())] == ["step-000002", "step-000003"]


@pytest.mark.parametrize("keep", [1, 2])
def test_only_sound_ones_are_counted_and_the_one_just_written_stays(folder: RunFolder, keep: int) -> None:
    """A damaged newer one was passed over; the run went on from step 2 and saves step 3 below it."""
    for step in (1, 2, 5):
        folder.checkpoints.save(state(step), keep=3)
    (folder.path / "checkpoints" / "step-000005" / "trained.safetensors").write_bytes(b"damaged")
    (folder.path / "checkpoints" / "step-000001" / "trained.safetensors").write_bytes(b"damaged")
    saved = folder.checkpoints.save(state(3), keep=keep)
    left = sorted(path.name for path in (folder.path / "checkpoints").iterdir())
    assert left == ["step-000002", "step-000003"][-keep:]
    assert saved.name == "step-000003"
    found = folder.checkpoints.latest()
    assert found is not None
    assert found.step == 3


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "state"])
def test_a_damaged_checkpoint_is_named_and_passed_over(folder: RunFolder, damage: str) -> None:
    folder.checkpoints.save(state(1), keep=3)
    newest = folder.checkpoints.save(state(2), keep=3)
    file = newest / "trained.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[:-3])
    elif damage == "remove":
        file.unlink()
    else:
        (newest / "state.json").write_text("{")
    with pytest.warns(UserWarning, match="step-000002 is damaged"):
        found = folder.checkpoints.latest()
    assert found is not None
    assert found.step == 1


def test_a_checkpoint_without_a_schema_is_read_and_a_later_ones_is_not_passed_over(folder: RunFolder) -> None:
    folder.checkpoints.save(state(1), keep=3)
    file = folder.checkpoints.save(state(2), keep=3) / "state.json"
    values = json.loads(file.read_text())
    assert values.pop("schema") == 1
    file.write_text(json.dumps(values))
    assert folder.checkpoints.latest().step == 2
    file.write_text(json.dumps(values | {"schema": 3}))
    with pytest.raises(BadInput, match=r"step-000002.state\.json has schema 3.*up to 2"):
        folder.checkpoints.latest()


def test_a_recipe_without_a_schema_is_read_and_a_later_ones_is_refused(folder: RunFolder, photos: Path) -> None:
    file = folder.path / "recipe.yaml"
    first, _, rest = file.read_text(encoding="utf-8").partition("\n")
    assert first == "# schema: 2"
    file.write_text(rest, encoding="utf-8")
    assert folder.recipe == recipe(photos)
    for number in ("3", "1.5", "one"):
        file.write_text(f"# schema: {number}\nanother: form", encoding="utf-8")
        with pytest.raises(BadInput, match=rf"recipe\.yaml has schema {number}.*up to 2"):
            take(folder, recipe(photos))


def test_a_later_versions_run_json_is_refused_before_anything_is_written_over(folder: RunFolder, photos: Path) -> None:
    file = folder.path / "run.json"
    file.write_text('{"schema": 2}')
    with pytest.raises(BadInput, match=r"run\.json has schema 2.*up to 1"):
        take(folder, recipe(photos))
    assert file.read_text() == '{"schema": 2}'


def test_no_pickle_is_written(folder: RunFolder) -> None:
    saved = folder.checkpoints.save(state(1), keep=1)
    assert {file.suffix for file in saved.iterdir()} == {".safetensors", ".json"}


def test_a_changed_recipe_is_refused_by_its_keys(folder: RunFolder, photos: Path) -> None:
    changed = recipe(photos, seed=1)
    with pytest.raises(BadInput, match=r"run\.seed"):
        take(folder, changed)


def test_more_steps_are_allowed_and_fewer_are_not(folder: RunFolder, photos: Path) -> None:
    take(folder, recipe(photos, steps=900))
    with pytest.raises(BadInput, match=r"run\.steps.*give at least 800"):
        take(folder, recipe(photos, steps=100))


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(BadInput, match="not a run folder"):
        take(RunFolder(tmp_path), recipe(photos))
    assert not (tmp_path / "recipe.yaml").exists()


def test_metrics_rewind_to_the_checkpoint_and_drop_a_cut_line(folder: RunFolder) -> None:
    metrics = MetricsFile(folder.path)
    for step in (1, 2, 3):
        metrics(StepDone(step, 0.5, 1e-4, 1.0, 0.1))
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    metrics(Restored(2))
    assert [json.loads(line)["step"] for line in (folder.path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize(
    "odd",
    [b"\xff\xfe\0\1" * 20, b"\0" * 100, b'{"step": 2, "loss": NaN, "lr": 1, "seconds": 1}\n', b'{"step": 2}\n',
     b'{"step": "2"}\n', b"[1]\n", b'{"step": 2, "lo'],
    ids=["binary", "zeros", "NaN", "no loss", "a text", "a list", "cut"],
)  # fmt: skip
def test_odd_lines_of_metrics_stop_neither_a_page_nor_a_resumed_run(odd: bytes, folder: RunFolder) -> None:
    metrics = MetricsFile(folder.path)
    metrics(StepDone(1, 0.5, 1e-4, 1.0, 0.1))
    with (folder.path / "metrics.jsonl").open("ab") as file:
        file.write(odd)
    assert [row["step"] for row in read_metrics(metrics.file)] == [1]
    metrics(Restored(1))
    metrics(StepDone(2, 0.25, 1e-4, 1.0, 0.1))
    assert [row["loss"] for row in read_metrics(metrics.file)] == [0.5, 0.25]


def test_a_second_run_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "dog").mkdir()
    assert next_folder("dog", tmp_path) == tmp_path / "dog-2"


def test_equal_content_is_equal_bytes_whatever_the_metadata_order(tmp_path: Path) -> None:
    """safetensors itself writes metadata in a random order."""
    from safetensors import safe_open

    about = {f"key {n}": f"wärt\n{n}" for n in range(20)}
    for turn in range(5):
        save_tensors(tmp_path / str(turn), {"b": torch.ones(3), "a": torch.zeros(2)}, dict(reversed(about.items())))
    assert len({(tmp_path / str(turn)).read_bytes() for turn in range(5)}) == 1
    with safe_open(tmp_path / "0", "pt") as held:
        assert held.metadata() == about
        assert torch.equal(held.get_tensor("b"), torch.ones(3))
