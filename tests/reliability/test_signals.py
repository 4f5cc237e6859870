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
from safetensors.torch import load_file
from work import wait_for_steps

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


def start(base: Path, photos: Path, run: Path, steps: int) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "finetune", "train", "dreambooth-lora", f"base={base}", f"data.photos={photos}",
        "data.class_noun=mug", "prior.count=2", "prior.steps=1", f"run.steps={steps}", f"run.dir={run}",
        "run.checkpoint_every=100000", "sample.steps=1", "sample.count=1", "optim.lr=1e-3",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_saves_says_how_to_go_on_and_ends_the_same(
    number: signal.Signals, tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    steps = 60
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    _, error = start(tiny_bases["sd1"], photos, whole, steps).communicate()
    assert (whole / "report.html").is_file(), error
    process = start(tiny_bases["sd1"], photos, stopped, steps)
    wait_for_steps(stopped, 3)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number, error
    assert f"finetune resume {stopped}" in error
    assert "Traceback" not in error
    (saved,) = (stopped / "checkpoints").iterdir()
    done = json.loads((saved / "state.json").read_text())["step"]
    assert 3 <= done < steps
    _, error = start(tiny_bases["sd1"], photos, stopped, steps).communicate()
    ends = [load_file(run / "adapter" / "trained.safetensors") for run in (whole, stopped)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items()), error
