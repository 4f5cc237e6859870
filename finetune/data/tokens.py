"""Rare tokens (arXiv:2208.12242 section 3.1), found in the base's own vocabulary.

A token is checked in four ways:

- Is it one piece in every tokenizer of the base?
- Is it rare? CLIP's ids are merge ranks, so a high id is a rare piece.
- Do the text encoders distinguish it? Its distance says how far it moves the prompt's embedding.
- Does the frozen base already draw something for it? Its prior strength says how much.

A weak prior alone is not enough. If the encoders hardly notice the token, "T mug" and "mug" are nearly the same
prompt, and the class becomes the subject (measured in docs/results.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from finetune.core.batch import Geometry
from finetune.core.errors import BadInput
from finetune.core.rng import generator
from finetune.families.base import Family

END = "</w>"
VOWELS = set("aeiou")
MEASURED_SIDE = 32
RARE_FROM = 0.8  # the last fifth of the vocabulary; CLIP's ids >= 40000 of 49408
KNOWN = {"sks": "a rifle"}  # popular tokens that have a meaning for real bases


@dataclass(frozen=True)
class Token:
    """What is known about one candidate.

    `pieces` are those of each tokenizer. `rank` is the smallest id as a fraction of the vocabulary (1 is rarest).
    `meaning` is a known meaning, or None. `strength` says how much the token changes the frozen base's prediction,
    relative to the class noun (see `prior_strengths`). `distance` says how far it moves the prompt's embedding,
    relative to the embedding's norm (see `embedding_distance`). The last two are None if they were not measured.
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


def check(family: Family, text: str, noun: str | None = None, measure: bool = True) -> Token:
    """Checks one token, used before the class noun `noun`. With `measure`, also measures its distance and strength."""
    token = describe(family.word_tokenizers, text)
    if not measure or not token.single:
        return token
    return _with_strengths(family, [_with_distance(family, token, noun)], noun)[0]


def suggest(family: Family, count: int = 10, noun: str | None = None, measured: int = 24) -> list[Token]:
    """Returns the `count` best of `measured` candidates from the rare range of the vocabulary, best first.

    The third of the candidates with the largest distance comes first, those with the weakest prior at the front. The
    others follow by decreasing distance.

    Raises:
        BadInput: the tokenizer has no rare word of one piece.
    """
    candidates = rare_tokens(family.word_tokenizers)
    if not candidates:
        raise BadInput(
            f"the tokenizer of {family.folder} has no rare word that is one token: choose a word yourself with "
            "data.token, and check it with `finetune tokens check`"
        )
    chosen = candidates[:: max(1, len(candidates) // measured)][:measured]
    found = [_with_distance(family, describe(family.word_tokenizers, text), noun) for text in chosen]
    found.sort(key=lambda token: token.distance or 0.0, reverse=True)
    distinct = -(-len(found) // 3)
    found = [*_with_strengths(family, found[: max(distinct, count)], noun), *found[max(distinct, count) :]]
    first = sorted(found[:distinct], key=lambda token: token.strength or 0.0)
    return [*first, *found[distinct:]][:count]


def describe(tokenizers: Sequence[Any], text: str) -> Token:
    """Returns what the tokenizers say about a text, without measuring distance and strength."""
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
    """Returns whole-word tokens of 3 or 4 letters, rarest first.

    Each is one piece in every tokenizer, in the rare range, and without a known meaning.
    """
    vocab = tokenizers[0].get_vocab()
    floor = RARE_FROM * len(tokenizers[0])
    words = [
        (number, text.removesuffix(END)) for text, number in vocab.items() if text.endswith(END) and number >= floor
    ]
    fitting = [text for _, text in sorted(words, reverse=True) if _looks_rare(text)]
    return [text for text in fitting if all(len(tokenizer.tokenize(text)) == 1 for tokenizer in tokenizers)]


def _looks_rare(text: str) -> bool:
    """Whether it is 3 or 4 lower-case ASCII letters without a vowel, and not a known word."""
    letters = 3 <= len(text) <= 4 and text.isascii() and text.isalpha() and text.islower()
    return letters and len(VOWELS & set(text)) == 0 and meaning_of(text) is None


def meaning_of(text: str) -> str | None:
    """Returns a known meaning of the token, or None."""
    if text in KNOWN:
        return KNOWN[text]
    return "a word, name or abbreviation" if text.lower() in _words() else None


def _words() -> frozenset[str]:
    return frozenset(files("finetune.data").joinpath("words.txt").read_text(encoding="utf-8").split())


def _with_distance(family: Family, token: Token, noun: str | None) -> Token:
    return replace(token, distance=embedding_distance(family, token.text, noun or "thing"))


def _with_strengths(family: Family, found: Sequence[Token], noun: str | None) -> list[Token]:
    measured = prior_strengths(family, [token.text for token in found], noun or "thing")
    return [replace(token, strength=strength) for token, strength in zip(found, measured, strict=True)]


@torch.no_grad()
def embedding_distance(family: Family, token: str, noun: str) -> float:
    """Returns |E(a photo of T N) - E(a photo of N)| / |E(a photo of N)|, for token T and noun N.

    E is everything that the denoiser is conditioned on, as one vector. Norms are Euclidean.
    """
    family.parts.place(family.text_encoders)
    both = family.encode_prompts([f"a photo of {token} {noun}", f"a photo of {noun}"])
    with_token, plain = (torch.cat([value[index].float().flatten() for value in both.values()]) for index in (0, 1))
    return float((with_token - plain).norm() / plain.norm())


def prior_strength(family: Family, token: str, noun: str, draws: int = 4) -> float:
    """Returns `prior_strengths` of one token."""
    return prior_strengths(family, [token], noun, draws)[0]


@torch.no_grad()
def prior_strengths(family: Family, texts: Sequence[str], noun: str, draws: int = 4) -> list[float]:
    """Returns |eps(a photo of T N) - eps(a photo of N)| / |eps(a photo of N) - eps()| for each token T of `texts`.

    eps is the frozen base's prediction for `draws` samples of fixed noise at fixed timesteps. Near 0, the base ignores
    the token. At 1, the token changes the prediction as much as the class noun does.
    """
    prompts = [f"a photo of {noun}", "", *[f"a photo of {text} {noun}" for text in texts]]
    family.parts.place(family.text_encoders)
    conditions = [family.encode_prompts([prompt] * draws) for prompt in prompts]
    family.parts.place(["denoiser"])
    plain, empty = (_predict(family, cond, draws) for cond in conditions[:2])
    scale = (plain - empty).norm().clamp(min=1e-8)
    return [float((_predict(family, cond, draws) - plain).norm() / scale) for cond in conditions[2:]]


def _predict(family: Family, cond: dict[str, Tensor], draws: int) -> Tensor:
    """The denoiser's output on pure noise, [draws, C, h, w], at noisy timesteps, which decide what is drawn.

    Latents are at most 32x32, because the user is waiting for the result.
    """
    device = family.device
    side = min(family.resolution // family.codec.factor, MEASURED_SIDE)
    shape = (draws, family.codec.channels, side, side)
    noise = torch.randn(shape, generator=generator(0, "prior strength")).to(device)
    last = family.schedule.steps - 1
    timesteps = torch.linspace(0.6 * last, 0.95 * last, draws, device=device).long()
    square = (side * family.codec.factor, side * family.codec.factor)
    return family.predict(noise, timesteps, cond, [Geometry(square, (0, 0), square)] * draws).float()
