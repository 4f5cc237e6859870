"""SIGINT and SIGTERM: the step is finished and saved, and a person is told how to go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import write_photos
from safetensors.torch import load_file
from work import wait_for_steps

from finetune.cli.main import run as finetune
from finetune.core.signals import Interrupted, Signals, Stop

ROOT = Path(__file__).parents[2]


def kill_myself(number: signal.Signals, pause: float = 0.01) -> None:
    os.kill(os.getpid(), number)
    time.sleep(pause)


def test_outside_the_loop_a_signal_interrupts_at_once() -> None:
    with Signals(Stop()), pytest.raises(Interrupted) as caught:
        kill_myself(signal.SIGTERM, pause=1)
    assert caught.value.number == signal.SIGTERM


def test_inside_the_loop_the_first_signal_is_noted_and_raised_at_its_end() -> None:
    reached = False
    with Signals(Stop()) as stop, pytest.raises(Interrupted), stop.deferred():  # noqa: PT012
        kill_myself(signal.SIGTERM)
        reached = stop.received == signal.SIGTERM
    assert reached


def test_a_second_ctrl_c_interrupts_inside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.core.signals.SAME_KEYPRESS", 0.0)
    reached = False
    with Signals(Stop()) as stop, pytest.raises(Interrupted), stop.deferred():  # noqa: PT012
        kill_myself(signal.SIGINT)
        kill_myself(signal.SIGINT, pause=1)
        reached = True
    assert not reached


def test_one_key_press_that_arrives_twice_is_one() -> None:
    reached = False
    with Signals(Stop()) as stop, pytest.raises(Interrupted), stop.deferred():  # noqa: PT012
        kill_myself(signal.SIGINT)
        kill_myself(signal.SIGINT)
        reached = True
    assert reached


def test_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Signals(Stop()):
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


STEPS = 60


def start(words: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "finetune", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.fixture(scope="module")
def words(tiny_bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command of a run; `run.dir` is to come."""
    photos = write_photos(tmp_path_factory.mktemp("signals") / "photos")
    return [
        "train", "dreambooth-lora", f"base={tiny_bases['sd1']}", f"data.photos={photos}", "data.class_noun=mug",
        "prior.count=2", "prior.others=null",
        "prior.steps=1", f"run.steps={STEPS}", "run.checkpoint_every=100000", "sample.steps=1",
        "sample.count=1", "optim.lr=1e-3",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody stops."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert finetune([*words, f"run.dir={run}"]) == (0, "")
    return run


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_saves_says_how_to_go_on_and_ends_the_same(
    number: signal.Signals, words: list[str], whole: Path, tmp_path: Path
) -> None:
    stopped = tmp_path / "stopped"
    command = [*words, f"run.dir={stopped}"]
    process = start(command)
    wait_for_steps(stopped, 3)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number, error
    assert f"finetune resume {stopped}" in error
    assert "Traceback" not in error
    (saved,) = (stopped / "checkpoints").iterdir()
    done = json.loads((saved / "state.json").read_text())["step"]
    assert 3 <= done < STEPS
    assert finetune(command) == (0, "")
    ends = [load_file(run / "adapter" / "trained.safetensors") for run in (whole, stopped)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
