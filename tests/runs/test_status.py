"""RUN/status.json: which phase it names, where one lies within another."""

from __future__ import annotations

from pathlib import Path

from finetune.core.events import phase, sent_to
from finetune.core.reading import read_json
from finetune.runs.status import StatusFile


def said(run: Path) -> tuple[str, int, int]:
    status = read_json(run / "status.json", dict)
    return status["phase"], status["done"], status["total"]


def test_after_a_preview_the_training_is_named_again(tmp_path: Path) -> None:
    file = StatusFile(tmp_path, 5)
    with sent_to(file), phase("Training", 5, "steps") as step:
        step(2, "")
        with phase("Preview", 4, "images") as draw:
            draw(3, "")
            file.write()
            assert said(tmp_path) == ("Preview", 3, 4)
        assert said(tmp_path) == ("Training", 2, 5)
        step(1, "")
        file.write()
        assert said(tmp_path) == ("Training", 3, 5)
    assert said(tmp_path) == ("Training", 3, 5)


def test_a_phase_that_ends_by_an_error_ends_those_in_it(tmp_path: Path) -> None:
    file = StatusFile(tmp_path, 5)
    with sent_to(file):
        try:
            with phase("Training", 5, "steps"), phase("Preview", 4, "images"):
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        with phase("After", 1):
            assert said(tmp_path) == ("After", 0, 1)
        assert said(tmp_path) == ("After", 0, 1)
