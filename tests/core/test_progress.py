"""Progress as lines: what they say, and where the log shows them."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.core import progress
from finetune.core.events import phase, sent_to
from finetune.core.progress import Pace, ProgressLines, clock, log, logged

ROOT = Path(__file__).parents[2]


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock of ours: its one number is the time in seconds."""
    time = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: time[0])
    return time


def test_a_line_at_begin_first_step_every_thirty_seconds_and_end(now: list[float]) -> None:
    lines: list[str] = []
    with sent_to(ProgressLines(lines.append)), phase("Training", 250, "steps") as advance:
        advance(0, "")
        for step in range(250):
            now[0] += 0.5
            advance(1, f"loss {step}")
    texts = [line.split("training  ")[1] for line in lines]
    assert texts == [
        "0 of 250 steps",
        "1 of 250 steps, loss 0, 2.0 steps a second, 2:04 left",
        "61 of 250 steps, loss 60, 2.0 steps a second, 1:34 left",
        "121 of 250 steps, loss 120, 2.0 steps a second, 1:04 left",
        "181 of 250 steps, loss 180, 2.0 steps a second, 0:34 left",
        "241 of 250 steps, loss 240, 2.0 steps a second, 0:04 left",
        "250 of 250 steps, loss 249, done after 2:05",
    ]


def test_a_phase_whose_length_is_not_known_is_told_without_it(now: list[float]) -> None:
    """It said "5 of 0 photos", and nothing between begin and end."""
    lines: list[str] = []
    with sent_to(ProgressLines(lines.append)), phase("Reading", 0, "photos") as advance:
        for _ in range(50):
            now[0] += 1
            advance(1, "")
    assert [line.strip() for line in lines] == [
        "reading  0 photos", "reading  30 photos", "reading  50 photos, done after 0:50",
    ]  # fmt: skip


def test_what_was_done_before_is_no_speed(now: list[float]) -> None:
    pace = Pace(250)
    pace.advance(200)
    assert (pace.worked, pace.left) == (0, None)
    now[0] += 10
    pace.advance(5)
    assert (pace.done, pace.speed, pace.left) == (205, 0.5, 90.0)


def test_slow_steps_are_told_in_seconds_and_an_early_end_is_told(now: list[float]) -> None:
    lines: list[str] = []

    def work() -> None:
        with phase("Training", 100, "steps") as advance:
            now[0] += 40
            advance(1, "")
            raise KeyError

    with pytest.raises(KeyError), sent_to(ProgressLines(lines.append)):
        work()
    assert lines[1].strip() == "training  1 of 100 steps, 40.0 s for each step, 1:06:00 left"
    assert lines[2].strip() == "training  1 of 100 steps, ended early, after 0:40"


def test_a_phase_inside_another(now: list[float]) -> None:
    lines: list[str] = []
    with sent_to(ProgressLines(lines.append)), phase("Training", 2, "steps") as advance:
        with phase("Preview", 1) as inner:
            now[0] += 40
            inner(1, "")
        advance(1, "")
    assert [line.split()[0] for line in lines] == ["training", "preview", "preview", "training"]


def test_times_are_short() -> None:
    assert [clock(seconds) for seconds in (0.4, 59.6, 754, 10_930)] == ["0:00", "1:00", "12:34", "3:02:10"]


SCRIPT = """
import logging
{before}
from finetune.core.events import phase
from finetune.core.progress import log, logged
with logged():
    log("hello")
    with phase("Training", 1, "steps") as advance:
        advance(1, "loss 1")
print(logging.getLogger("finetune").handlers, logging.getLogger("finetune").level)
"""


@pytest.mark.parametrize(
    ("before", "shown"),
    [
        ("", True),  # nothing is configured
        ("logging.basicConfig(level='INFO')", True),
        ("logging.basicConfig()", False),  # the application wants warnings
        ("logging.getLogger('finetune').setLevel('ERROR')", False),
        ("logging.getLogger('finetune').addHandler(logging.NullHandler())", False),
        ("import os; os.environ['RANK'] = '1'", True),  # left behind by a launcher: there is one process
        ("import os; os.environ.update(RANK='1', WORLD_SIZE='2')", False),  # not the main process
    ],
)
def test_the_application_decides_what_is_shown(before: str, shown: bool) -> None:
    command = [sys.executable, "-c", SCRIPT.format(before=before)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    said = done.stderr.splitlines()
    assert len(said) == (3 if shown else 0), done.stderr
    assert not shown or "1 of 1 steps, loss 1, done" in said[-1]
    assert len(done.stdout.splitlines()) == 1, done.stdout
    if not before:
        assert done.stdout == "[] 0\n", "nothing stays behind"


def test_a_notebook_shows_the_lines_once_though_its_root_has_a_handler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """pytest's own handler on the root stands for Colab's."""
    monkeypatch.setattr(progress, "_in_notebook", lambda: True)
    assert logging.getLogger().handlers
    with logged():
        log("in a cell")
    assert capsys.readouterr().out == "in a cell\n"
    assert not caplog.records
    log("after it")
    assert capsys.readouterr().out == ""
