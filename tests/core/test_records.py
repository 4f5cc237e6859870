"""Records at the seams: nothing is lost on the way through JSON, and older files are still read."""

from __future__ import annotations

import json

import pytest

from finetune.core.records import Check, checks_of


@pytest.mark.parametrize("error", [None, 0.0, 1.5e-3])
def test_a_check_comes_back_from_json_as_it_was(error: float | None) -> None:
    check = Check("weights", False, "3 modules differ", error)
    assert checks_of(json.loads(json.dumps({"results": [check.values()]}))) == [check]


def test_no_number_that_json_does_not_have_is_written() -> None:
    for error in (float("inf"), float("nan")):
        assert json.dumps(Check("weights", False, "x", error).values(), allow_nan=False)


def test_lines_of_an_older_file_are_taken_over() -> None:
    """exports.json had lines alone; what is shown of them is what stood there."""
    lines = ["ok: 3 modules re-read", "FAILED: one is odd"]
    found = checks_of({"checks": lines})
    assert [check.passed for check in found] == [True, False]
    assert [check.line for check in found] == lines
