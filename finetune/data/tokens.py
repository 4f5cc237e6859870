"""Rare tokens (arXiv:2208.12242 section 3.1), found in the base's own vocabulary.

A token is checked in six ways:

- Is it one piece in every tokenizer of the base?
- Is it rare? CLIP's ids are merge ranks, so a high id is a rare piece.
- Does it mean something to people? Lists and rules say so (`finetune.data.meanings`).
- Does it lie among tokens with a meaning in the embedding table, or move prompts as they do? Then it may have one too.
- Do the text encoders distinguish it in every prompt? Its distance says how far it moves the prompt's embedding.
- Does the frozen base already draw something for it? Its prior strength says how much.

A weak prior alone is not enough. If the encoders hardly notice the token, "T mug" and "mug" are nearly the same
prompt, and the class becomes the subject (measured in docs/results.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from finetune.core.errors import BadInput
from finetune.data import meanings
from finetune.data.meanings import meaning_of
from finetune.data.strengths import END, movements, neighbourhoods, prior_strengths
from finetune.families.base import Family

VOWELS = set("aeiou")
RARE_FROM = 0.8  # the last fifth of the vocabulary; CLIP's ids >= 40000 of 49408
FEWEST = 8  # tokens: those with a meaning to compare with, and the candidates that stay at least
MOST_KNOWN = 256


@dataclass(frozen=True)
class Token:
    """What is known about one candidate.

    `pieces` are those of each tokenizer. `rank` is the smallest id as a fraction of the vocabulary (1 is rarest).
    `meaning` is a known meaning, or None. `strength` says how much the token changes the frozen base's prediction,
    relative to the class noun (see `prior_strengths`). `distance` says how far it moves the prompt's embedding,
    relative to the embedding's norm, in the prompt that it moves least (see `movements`). The last two are None if
    they were not measured.
    """

    text: str
    pieces: list[list[str]]
    rank: float
    meaning: str | None
    strength: float | None = None
    distance: float | None = None

    @property
    def single(self) -> bool:
        """Whether it is one piece in every tokenizer."""
        return all(len(pieces) == 1 for pieces in self.pieces)

    @property
    def good(self) -> bool:
        """Whether it is a single, rare token without a known meaning."""
        return self.single and self.meaning is None and self.rank >= RARE_FROM

    @property
    def verdict(self) -> str:
        """A sentence that says what the token is, and whether to use it."""
        if not self.single:
            split = " + ".join(next(p for p in self.pieces if len(p) > 1))
            return f"{self.text!r} is not one token ({split}): choose another"
        if self.meaning:
            return f"{self.text!r} is one token, but the base may know it: it is {self.meaning}"
        if self.rank < RARE_FROM:
            return f"{self.text!r} is one token, but a common one (rank {self.rank:.2f} of 1): choose a rarer one"
        return f"{self.text!r} is one rare token (rank {self.rank:.2f} of 1)"

    @property
    def warning(self) -> str:
        """A sentence for who chose a token that the base may know; empty for others."""
        better = "data.token=auto finds a rare token without a meaning"
        if self.meaning:
            return f"{self.text!r} is {self.meaning}, which the base may know: {better}"
        if self.single and self.rank < RARE_FROM:
            return f"{self.text!r} is a common token (rank {self.rank:.2f} of 1), which the base may know: {better}"
        return ""


def check(family: Family, text: str, noun: str | None = None, measure: bool = True) -> Token:
    """Checks one token, used before the class noun `noun`. With `measure`, also measures its distance and strength, if
    it is one piece in every tokenizer.

    Raises:
        BadInput: as `describe`.
    """
    token = describe(family.word_tokenizers, text)
    if not measure or not token.single:
        return token
    return _with_strengths(family, _with_distances(family, [token], noun), noun)[0]


def suggest(family: Family, count: int = 10, noun: str | None = None, measured: int = 24) -> list[Token]:
    """Returns the `count` best of `measured` candidates from the rare range of the vocabulary, best first.

    Candidates that the base may know are left out. In the embedding table they lie nearer to tokens with a meaning
    than half of the listed rare tokens do, or they move some prompt further than half of those do. Of the others, the
    third that moves every prompt furthest comes first, those with the weakest prior at the front. The rest follows by
    decreasing distance. A vocabulary without listed tokens, such as the tiny base's, has nothing to compare with.

    Raises:
        BadInput: the tokenizer has no rare word of one piece.
    """
    candidates = rare_tokens(family.word_tokenizers)
    if not candidates:
        raise BadInput(
            f"the tokenizer of {family.folder} has no rare word that is one token: choose a word yourself with "
            "data.token, and check it with `finetune tokens check`"
        )
    others, least = _listed(family.word_tokenizers), max(count, FEWEST)
    candidates = _apart(family, candidates, others, least)
    chosen = candidates[:: max(1, len(candidates) // measured)][:measured]
    found = _measured(family, chosen, _spread(others, FEWEST), noun or "thing", least)
    distinct = -(-len(found) // 3)
    found = [*_with_strengths(family, found[: max(distinct, count)], noun), *found[max(distinct, count) :]]
    first = sorted(found[:distinct], key=lambda token: token.strength or 0.0)
    return [*first, *found[distinct:]][:count]


def _measured(family: Family, chosen: list[str], others: list[str], noun: str, least: int) -> list[Token]:
    """The chosen tokens with distances, largest first, without those that move a prompt as a meaning does.

    At least `least` stay if there are as many: then the weakest of the others.
    """
    moved = movements(family, [*chosen, *others], noun)
    own, known_ones = moved[: len(chosen)], moved[len(chosen) :]
    excess = (own / known_ones.median(0).values).amax(1) if others else torch.zeros(len(chosen))
    kept = _lowest(excess, 1.0, least)
    tokens = [replace(describe(family.word_tokenizers, chosen[n]), distance=float(own[n].min())) for n in kept]
    return sorted(tokens, key=lambda token: token.distance or 0.0, reverse=True)


def _apart(family: Family, candidates: list[str], others: list[str], least: int) -> list[str]:
    """The candidates that lie no nearer to tokens with a meaning than half of the listed ones; at least `least`."""
    if not others:
        return candidates
    meaningful = [*_ordinary(family.word_tokenizers), *others]
    near = neighbourhoods(family, [*candidates, *others], meaningful)
    own, known_ones = near[: len(candidates)], near[len(candidates) :]
    return [candidates[n] for n in _lowest(own, float(known_ones.median()), least)]


def _lowest(values: torch.Tensor, limit: float, least: int) -> list[int]:
    """The places of the values up to `limit`, in order; if they are fewer than `least`, of the `least` lowest."""
    lowest = values.argsort(stable=True)[:least].tolist()
    within = (values <= limit).nonzero().flatten().tolist()
    return within if len(within) >= least else sorted(lowest)


def _spread(texts: list[str], most: int) -> list[str]:
    """At most `most` of the texts, at even distances."""
    return texts[:: max(1, len(texts) // most)][:most]


def _listed(tokenizers: Sequence[Any]) -> list[str]:
    """Rare tokens with a listed meaning, rarest first, to compare candidates with; none if the vocabulary has few."""
    found = [text for text in _rare_words(tokenizers) if text in meanings.explained() and _single(tokenizers, text)]
    return _spread(found, MOST_KNOWN) if len(found) >= FEWEST else []


def _ordinary(tokenizers: Sequence[Any]) -> list[str]:
    """The vocabulary's common words of 4 letters or more."""
    vocab, most = tokenizers[0].get_vocab(), RARE_FROM * len(tokenizers[0])
    found = [text.removesuffix(END) for text, number in vocab.items() if text.endswith(END) and number < most]
    return [text for text in found if len(text) >= 4 and text.isalpha() and text.isascii()]


def describe(tokenizers: Sequence[Any], text: str) -> Token:
    """Returns what the tokenizers say about a text, without measuring distance and strength.

    Raises:
        BadInput: the text has no piece in one of the tokenizers, as a blank one has none.
    """
    pieces = [tokenizer.tokenize(text) for tokenizer in tokenizers]
    if not all(pieces):
        raise BadInput(f"the token {text!r} holds nothing that the base's tokenizer reads: give a word, such as sks")
    ranks = [
        tokenizer.convert_tokens_to_ids(split[0]) / len(tokenizer)
        for tokenizer, split in zip(tokenizers, pieces, strict=True)
    ]
    shown = [[piece.removesuffix(END) for piece in split] for split in pieces]
    special = special_in(tokenizers, text)
    return Token(text, shown, min(ranks), f"the tokenizer's mark {special}, no word" if special else meaning_of(text))


def special_in(tokenizers: Sequence[Any], text: str) -> str | None:
    """The tokenizer's own mark, such as <|endoftext|>, that a text is or has in it; None where it has none.

    A mark of a single letter, such as the "!" that fills up Stable Diffusion 2's prompts, counts only alone.
    """
    specials = [special for tokenizer in tokenizers for special in tokenizer.all_special_tokens]
    return next((each for each in specials if each == text or (len(each) > 1 and each in text)), None)


def rare_tokens(tokenizers: Sequence[Any]) -> list[str]:
    """Returns whole-word tokens of 3 to 5 letters, rarest first.

    Each is one piece in every tokenizer, in the rare range, and without a known meaning. It has no vowel, or it was
    looked at and means nothing (pieces.txt): what has a vowel is mostly a word or a name.
    """
    return [text for text in _rare_words(tokenizers) if _looks_rare(text) and _single(tokenizers, text)]


def _rare_words(tokenizers: Sequence[Any]) -> list[str]:
    """The first vocabulary's whole words in the rare range, rarest first."""
    vocab, floor = tokenizers[0].get_vocab(), RARE_FROM * len(tokenizers[0])
    words = [
        (number, text.removesuffix(END)) for text, number in vocab.items() if text.endswith(END) and number >= floor
    ]
    return [text for _, text in sorted(words, reverse=True)]


def _single(tokenizers: Sequence[Any], text: str) -> bool:
    return all(len(tokenizer.tokenize(text)) == 1 for tokenizer in tokenizers)


def _looks_rare(text: str) -> bool:
    """Whether it is a reviewed piece, or 3 or 4 lower-case ASCII letters without a vowel and without a meaning."""
    letters = 3 <= len(text) <= 4 and text.isascii() and text.isalpha() and text.islower()
    return text in meanings.pieces() or (letters and len(VOWELS & set(text)) == 0 and meaning_of(text) is None)


def _with_distances(family: Family, found: Sequence[Token], noun: str | None) -> list[Token]:
    moved = movements(family, [token.text for token in found], noun or "thing").amin(1).tolist()
    return [replace(token, distance=distance) for token, distance in zip(found, moved, strict=True)]


def _with_strengths(family: Family, found: Sequence[Token], noun: str | None) -> list[Token]:
    measured = prior_strengths(family, [token.text for token in found], noun or "thing")
    return [replace(token, strength=strength) for token, strength in zip(found, measured, strict=True)]
