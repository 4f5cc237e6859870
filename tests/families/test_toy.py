"""What is said of the tiny base is what it was trained on."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.families.toy import KINDS, expectation


def test_the_kinds_are_those_of_the_world_that_it_was_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples" / "tiny_base"))
    import shapes

    assert sorted(KINDS) == sorted(shapes.CLASSES)


def test_a_noun_that_it_does_not_know_is_named() -> None:
    assert "does not know" not in (expectation("tiny", ["mug", "Red Mug", None]) or "")
    assert "does not know 'dog' or 'cat'" in (expectation("tiny", ["dog", "mug", "cat"]) or "")
    assert expectation("stable-diffusion-v1-5/stable-diffusion-v1-5", ["dog"]) is None
