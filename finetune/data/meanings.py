"""What short tokens mean to people, and so to a base: the shipped lists, and rules for what no list can hold.

`known.txt` and `words.txt` hold what has a meaning; `pieces.txt` holds ends of words that have none.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from finetune.core.reading import list_items

KNOWN = {"sks": "a rifle"}  # popular tokens that have a meaning for real bases
ENDINGS = {"wx": "a weather hashtag", "fc": "a football club", "tv": "a TV channel"}  # of 4 or 5 letters


def meaning_of(text: str) -> str | None:
    """Returns a known meaning of a token, such as "an abbreviation (a football slogan)", or None."""
    word = text.lower()
    if word in KNOWN:
        return KNOWN[word]
    if word in pieces():
        return None
    return known().get(word) or _by_rule(word)


def _by_rule(word: str) -> str | None:
    """What is known of it without the plural's s, or what its ending says."""
    single = known().get(word[:-1]) if word.endswith("s") and len(word) > 3 else None
    if single:
        return f"the plural of {single}"
    return ENDINGS.get(word[-2:]) if 4 <= len(word) <= 5 and word.isalpha() and word.isascii() else None


@cache
def known() -> dict[str, str]:
    """Token -> what it is, of words.txt and known.txt."""
    return dict.fromkeys(_text("words.txt").split(), "a word, name or abbreviation") | explained()


@cache
def explained() -> dict[str, str]:
    """Rare token of CLIP's vocabulary -> what it is, of known.txt."""
    found, kind = {}, ""
    for line in _lines("known.txt"):
        if line.startswith("["):
            kind = line.strip("[]")
        elif ":" in line:
            word, meaning = line.split(": ", 1)
            found[word] = f"{kind} ({meaning})"
        else:
            found |= dict.fromkeys(line.split(), kind)
    return found


@cache
def pieces() -> dict[str, str]:
    """Ends of words that mean nothing alone -> words that end so."""
    return dict(line.split(": ", 1) for line in _lines("pieces.txt"))


def _lines(name: str) -> list[str]:
    return list_items(_text(name))


def _text(name: str) -> str:
    return files("finetune.data").joinpath(name).read_text(encoding="utf-8")
