"""The words that call a subject are those of its captions."""

from __future__ import annotations

import pytest

from finetune.data.trained_words import trained_words


@pytest.mark.parametrize(
    ("token", "noun", "captions", "said"),
    [
        ("zwx", "mug", ["a photo of zwx mug"], "zwx mug"),
        ("zwx", "mug", ["a photo of a Zwx  Mug on a table"], "zwx mug"),
        ("<zwx>", "dog", ["a photo of <zwx>", "a picture of <zwx>"], "<zwx>"),
        ("zwx", "dog", ["zwx, dog, grass"], "zwx"),
        ("zwx", "dog", ["zwx dog", "zwx"], "zwx dog"),
        ("zwx", "dog", ["zwx dog", "zwx", "zwx on grass"], "zwx"),
        ("zwx", "dog", ["zwx doghouse", "a xzwx dog"], "zwx"),
        ("zwx", "dog", ["a dog", "grass"], "zwx dog"),
        ("zwx", "dog", [], "zwx dog"),
        ("zwx", None, ["a photo of zwx"], "zwx"),
        ("", "dog", ["a dog"], "dog"),
        ("", None, [], ""),
    ],
)
def test_the_words_of_captions(token: str, noun: str | None, captions: list[str], said: str) -> None:
    assert trained_words(token, noun, captions) == said
