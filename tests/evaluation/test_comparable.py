"""Sources that were drawn otherwise, or of other prompts, are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.evaluation.base import Pictures, Prompt
from finetune.evaluation.comparable import uneven


def source(name: str, count: int = 2, **about: Any) -> Pictures:
    return Pictures(name, [Prompt("a zwx dog", "a dog")], [[Path("0.png")] * count], about)


def test_alike_sources_need_no_word() -> None:
    sampling = {"size": 64, "guidance": 5.0}
    assert uneven([source("a", sampling=sampling), source("b", sampling=dict(sampling)), source("found")]) == []


def test_other_settings_and_numbers_are_named() -> None:
    own, first = {"size": 32, "guidance": 7.5, "steps": 25}, {"size": 64, "guidance": 5.0, "steps": 25}
    assert uneven([source("found"), source("a", sampling=first), source("b", 3, sampling=own)]) == [
        "b: other prompts or numbers of images than found: compare with care",
        "b: other settings than a (size 32 instead of 64, guidance 7.5 instead of 5.0): compare with care",
    ]
