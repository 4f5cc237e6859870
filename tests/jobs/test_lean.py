"""A job does nothing twice: counted are searches, hashes, loads and predictions, never seconds."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune.data import tokens
from finetune.families.source import load_family
from finetune.jobs import stored_tokens
from finetune.jobs.stored_tokens import suggested
from finetune.testing.tiny import write_tiny


def counting(monkeypatch: pytest.MonkeyPatch, place: Any, name: str) -> list[Any]:
    """The first argument of every call of `place.name`, which still does its work."""
    real, calls = getattr(place, name), []
    monkeypatch.setattr(place, name, lambda *given, **named: calls.append(given[0]) or real(*given, **named))
    return calls


def test_a_token_is_searched_once_for_a_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Again for another noun and another base; a damaged file is no answer."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    write_tiny("sd1", tmp_path / "base")
    family = load_family(str(tmp_path / "base"))
    wanted = [token.text for token in tokens.suggest(family, 2, "mug")]
    searches = counting(monkeypatch, stored_tokens.tokens, "suggest")
    assert [suggested(load_family(str(tmp_path / "base")), 2, "mug") for _ in range(3)] == [wanted] * 3
    assert len(searches) == 1
    suggested(family, 2, "dog")
    suggested(family, 1, "mug")
    assert len(searches) == 3
    write_tiny("sd1", tmp_path / "other", seed=1)
    suggested(load_family(str(tmp_path / "other")), 2, "mug")
    assert len(searches) == 4
    for text in ("{", '{"tokens": []}', '{"tokens": [1]}', "[]"):
        for file in (tmp_path / "cache" / "tokens").iterdir():
            file.write_text(text)
        before = len(searches)
        assert suggested(family, 2, "mug") == wanted
        assert len(searches) == before + 1
    shutil.rmtree(tmp_path / "cache")
    assert suggested(family, 2, "mug") == wanted
