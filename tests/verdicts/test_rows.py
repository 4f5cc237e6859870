"""RUN/verdicts.jsonl: appended, cut when a run resumes, and read with care."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.core.errors import BadInput
from finetune.core.events import Measured, Restored
from finetune.verdicts.changed import Change
from finetune.verdicts.memorisation import Memorisation, Nearest
from finetune.verdicts.rows import FILE, Row, VerdictsFile, read_rows, up_to
from finetune.verdicts.rules import judged
from finetune.verdicts.verdict_file import SaidByImages, read_remarks, write_verdict


def test_rows_come_back_and_a_resumed_run_cuts_them(tmp_path: Path) -> None:
    consumer = VerdictsFile(tmp_path)
    for step in (0, 50, 100):
        consumer(Measured(step, {"learned": step / 100}, 0.5, "good"))
    rows = read_rows(tmp_path / FILE)
    wanted = [(0, 0, 0.5), (50, 0.5, 0.5), (100, 1, 0.5)]
    assert [(row.step, row.values["learned"], row.seconds) for row in rows] == wanted
    consumer(Restored(60))
    consumer(Measured(0, {"learned": 9.0}, 0.5))  # at every start; the first line stays
    consumer(Measured(100, {"learned": 2.0}, 0.5))
    assert [(row.step, row.values["learned"]) for row in read_rows(tmp_path / FILE)] == [(0, 0), (50, 0.5), (100, 2)]
    assert [row.step for row in up_to(rows, 50)] == [0, 50]


def test_lines_that_no_run_writes_are_skipped(tmp_path: Path) -> None:
    file = tmp_path / FILE
    good = json.dumps({"step": 50, "learned": 0.5, "seconds": 0.1})
    bad = ["[1]", '{"step": "5"}', '{"learned": 1}', '{"step": 1.5, "seconds": 1}', '{"step": -1, "seconds": 0}']
    bad += ['{"step": 3, "learned": NaN, "seconds": 0}', '{"step": 4, "learned": "<b>", "seconds": 0}', good[:-9]]
    file.write_text("\n".join([*bad[:4], good, *bad[4:]]))
    assert [row.step for row in read_rows(file)] == [50]
    VerdictsFile(tmp_path)(Restored(100))
    assert file.read_text() == good + "\n"
    assert read_rows(tmp_path / "none") == []
    file.unlink()
    file.mkdir()
    with pytest.raises((BadInput, OSError)):
        read_rows(file)


def test_the_record_says_what_was_measured_and_what_was_not(tmp_path: Path) -> None:
    drawn = Memorisation([Nearest("00-0.png", 1, 0.01, 0.1, True)], 0.3, 1.2)
    rows = [Row(0), Row(5, {"learned": 9.0})]
    write_verdict(tmp_path, judged(rows), rows[-1], SaidByImages(drawn, Change(0.2, "subject")), ["No class."])
    held = json.loads((tmp_path / "verdict.json").read_text())
    assert held["word"] == "good"
    assert held["step"] == 5
    assert held["memorisation"]["nearest"][0]["photo"] == 1
    assert held["changed"]["share"] == 0.2
    little, *rest = read_remarks(tmp_path)
    assert little.startswith("The images with the token changed little: by 20% of")
    assert rest == ["1 of 1 images are close to copies of a training photo.", "No class."]
    write_verdict(tmp_path, judged(rows), rows[-1], SaidByImages(None, Change(0.5, "subject")), [])
    assert read_remarks(tmp_path) == []
    (tmp_path / "verdict.json").write_text('{"schema": 99}')
    with pytest.raises(BadInput, match="schema 99"):
        read_remarks(tmp_path)
    for damaged in ("", "[]", '{"memorisation": 3, "left_out": {"a": 1}}', '{"memorisation": {"sentence": 5}}'):
        (tmp_path / "verdict.json").write_text(damaged)
        assert read_remarks(tmp_path) == []
