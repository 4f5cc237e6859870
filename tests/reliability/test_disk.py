"""A full disk, a locked folder, left-overs of a kill: the last good checkpoint stays, and a person is told."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from finetune.config.load import parse_recipe
from finetune.config.recipe import Recipe
from finetune.core.errors import BadInput
from finetune.core.files import save_tensors
from finetune.runs.folder import RunFolder
from finetune.training.checkpoint import State

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(photos: Path) -> Recipe:
    data = {"photos": str(photos), "class_noun": "mug"}
    return parse_recipe({"data": data, "method": {"kind": "lora"}, "optim": {"kind": "adamw"}})


def state(step: int, size: int = 100) -> State:
    return State(step, {"denoiser.x": torch.full((size,), float(step))}, {}, {}, {})


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel refuses to let any file grow beyond `size`, as a full disk would."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_checkpoint_before_and_says_so(recipe: Recipe, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.held(recipe):
        folder.checkpoints.save(state(1), keep=1)
        with largest_file(20_000), pytest.raises(BadInput, match=r"step 2 could not be written.*free some space"):
            folder.checkpoints.save(state(2, size=100_000), keep=1)
        found = folder.checkpoints.latest()
    assert found is not None
    assert found.step == 1
    assert [path.name for path in (folder.path / "checkpoints").iterdir()] == ["step-000001"]


def test_a_weight_file_is_whole_or_not_there(tmp_path: Path) -> None:
    with largest_file(20_000), pytest.raises(OSError, match="File too large"):
        save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(100_000)})
    assert not list(tmp_path.iterdir())


def test_a_run_that_would_not_fit_is_refused_before_it_starts(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000_000))
    folder = RunFolder(tmp_path)
    folder.checkpoints.check_space(10_000_000)
    with pytest.raises(BadInput, match=r"0\.01 GB free but .* need 0\.02 GB"):
        folder.checkpoints.check_space(20_000_000)


def test_left_overs_of_a_kill_are_swept_away(recipe: Recipe, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.held(recipe):
        (folder.path / "checkpoints" / ".step-000001.tmp").mkdir(parents=True)
        folder.checkpoints.save(state(2), keep=2)
    assert [path.name for path in (folder.path / "checkpoints").iterdir()] == ["step-000002"]


HOLD = """
import sys, time
from pathlib import Path
from finetune.runs.folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
with folder.held(folder.recipe):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_on_a_folder_is_refused_and_a_dead_one_is_not_in_the_way(recipe: Recipe, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.held(recipe):
        pass
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLD, str(folder.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(BadInput, match=f"in use by process {other.pid} on"), folder.held(recipe):
            pass
        other.kill()
    with folder.held(recipe):
        assert str(os.getpid()) in (folder.path / "run.lock.txt").read_text()


def test_a_run_that_slips_in_before_the_lock_is_not_written_over(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another recipe's run begins and ends in the folder between the first look and the lock."""
    other = recipe.model_copy(update={"run": recipe.run.model_copy(update={"seed": 7})})
    folder, lock = RunFolder(tmp_path / "run"), RunFolder._lock

    def late(self: RunFolder) -> object:
        monkeypatch.setattr(RunFolder, "_lock", lock)
        with RunFolder(self.path).held(other):
            pass
        return lock(self)

    monkeypatch.setattr(RunFolder, "_lock", late)
    with pytest.raises(BadInput, match=r"another recipe \(changed: run.seed, which was 7\)"), folder.held(recipe):
        pytest.fail("both hold it")
    assert folder.recipe.run.seed == 7


def test_a_folder_with_nothing_but_a_lock_is_empty(recipe: Recipe, tmp_path: Path) -> None:
    """A kill right after the lock was taken leaves that."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    (folder.path / "run.lock").touch()
    with folder.held(recipe):
        assert folder.recipe == recipe
