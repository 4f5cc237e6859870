"""The words that call a subject in prompts: those that stand in the captions that it was trained with."""

from __future__ import annotations

import re
from collections.abc import Iterable


def trained_words(token: str, noun: str | None, captions: Iterable[str]) -> str:
    """Returns "zwx mug", or "zwx" where most captions with the token have it in place of the noun.

    Captions without the token say nothing. Case does not count, since text encoders read without it.
    """
    if not token or not noun:
        return token or noun or ""
    both, alone = (_as_spoken(f"{token} {noun}"), _as_spoken(token))
    said = [" ".join(text.split()) for text in captions]
    with_token = [text for text in said if alone.search(text)]
    with_noun = sum(bool(both.search(text)) for text in with_token)
    return token if 2 * with_noun < len(with_token) else f"{token} {noun}"


def _as_spoken(words: str) -> re.Pattern[str]:
    """Finds words, but not inside of longer ones."""
    return re.compile(rf"(?<!\w){re.escape(' '.join(words.split()))}(?!\w)", re.IGNORECASE)
