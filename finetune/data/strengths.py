"""How strongly a frozen base reacts to a token: its text encoders, its embedding table and its denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import normalize

from finetune.core.batch import Geometry
from finetune.core.rng import generator
from finetune.families.base import Family

PROMPTS = ("a photo of {}", "a painting of {}", "a photo of {} on the beach")
MEASURED_SIDE = 32
TOGETHER = 16  # prompts in one pass of the text encoders
NEIGHBOURS = 8
DRAWS = 4  # samples of noise
END = "</w>"  # of a whole word in CLIP's vocabulary


@torch.no_grad()
def movements(family: Family, tokens: Sequence[str], noun: str) -> Tensor:
    """Returns |E(p of T N) - E(p of N)| / |E(p of N)| for each token T and each p of `PROMPTS`: [tokens, prompts].

    N is the noun. E is everything that the denoiser is conditioned on, as one vector. Norms are Euclidean.
    """
    family.parts.place(family.text_encoders)
    rows = []
    for prompt in PROMPTS:
        plain = _encoded(family, [prompt.format(noun)])
        texts = [prompt.format(f"{token} {noun}") for token in tokens]
        some = [texts[start : start + TOGETHER] for start in range(0, len(texts), TOGETHER)]
        rows.append(torch.cat([(_encoded(family, each) - plain).norm(dim=1) for each in some]) / plain.norm())
    return torch.stack(rows, 1).cpu()


def _encoded(family: Family, prompts: list[str]) -> Tensor:
    """Each prompt's conditions as one vector, [prompts, values]."""
    return torch.cat([value.float().flatten(1) for value in family.encode_prompts(prompts).values()], 1)


@torch.no_grad()
def neighbourhoods(family: Family, tokens: Sequence[str], known: Sequence[str]) -> Tensor:
    """How near each token lies to tokens with a meaning in the embedding tables, [tokens]; 1 is on top of them.

    It is the mean of its `NEIGHBOURS` largest cosines with `known`, itself left out, over all encoders that read
    single words. The mean of the table is taken off first, because it is near the place of all rare tokens.
    """
    found = [
        nearest(_table(family, index), _numbers(tokenizer, tokens), _numbers(tokenizer, known))
        for index, tokenizer in enumerate(family.tokenizers)
        if any(tokenizer is each for each in family.word_tokenizers)
    ]
    return torch.stack(found).mean(0)


def nearest(table: Tensor, rows: Sequence[int], others: Sequence[int]) -> Tensor:
    """Returns the mean of the largest cosines of each row of `table` [V, width] with `others`: [rows]."""
    centre = table.float().mean(0)
    chosen, compared = (normalize(table[list(each)].float() - centre) for each in (rows, others))
    cosines = chosen @ compared.T
    cosines[torch.tensor(list(rows))[:, None] == torch.tensor(list(others))[None]] = -1
    return cosines.topk(min(NEIGHBOURS, len(others)), dim=1).values.mean(1)


def _table(family: Family, index: int) -> Tensor:
    encoder = cast(Any, family.parts[family.text_encoders[index]])
    return cast(Tensor, encoder.get_input_embeddings().weight).detach().cpu()


def _numbers(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """The rows of the words that the vocabulary holds as one piece."""
    vocab = tokenizer.get_vocab()
    return [vocab[word + END] for word in words if word + END in vocab]


def prior_strengths(family: Family, texts: Sequence[str], noun: str) -> list[float]:
    """Returns |eps(a photo of T N) - eps(a photo of N)| / |eps(a photo of N) - eps()| for each token T of `texts`.

    eps is the frozen base's prediction for a few samples of fixed noise at fixed timesteps. Near 0, the base ignores
    the token. At 1, the token changes the prediction as much as the class noun does.
    """
    return [strength for _, strength in sorted(weakest(family, texts, noun, len(texts)))]


@torch.no_grad()
def weakest(family: Family, texts: Sequence[str], noun: str, count: int) -> list[tuple[int, float]]:
    """Returns the `count` tokens of `texts` with the lowest `prior_strengths`, lowest first, as (place, strength).

    The square of a strength is a sum over samples. The token with the lowest sum so far gets the next sample, so
    none is looked at further once its sum is above those of the weakest: with SD1.5 a prediction takes a second.
    """
    if not texts:
        return []
    prompts = [f"a photo of {noun}", "", *[f"a photo of {text} {noun}" for text in texts]]
    family.parts.place(family.text_encoders)
    plain, empty, *conditions = [family.encode_prompts([prompt]) for prompt in prompts]
    family.parts.place(["denoiser"])
    nouns = [_predict(family, plain, draw) for draw in range(DRAWS)]
    scale = sum(_square(nouns[draw], _predict(family, empty, draw)) for draw in range(DRAWS)) ** 0.5
    waiting = [(0.0, place, 0) for place in range(len(texts))]
    found: list[tuple[int, float]] = []
    while waiting and len(found) < count:
        square, place, draw = heappop(waiting)
        if draw == DRAWS:
            found.append((place, square**0.5 / max(scale, 1e-8)))
        else:
            square += _square(nouns[draw], _predict(family, conditions[place], draw))
            heappush(waiting, (square, place, draw + 1))
    return found


def _square(one: Tensor, other: Tensor) -> float:
    """The squared Euclidean distance."""
    return float((one - other).square().sum())


def _predict(family: Family, cond: dict[str, Tensor], draw: int) -> Tensor:
    """The denoiser's output on pure noise, [1, C, h, w], at a noisy timestep, which decides what is drawn.

    Latents are at most 32x32, because the user is waiting for the result.
    """
    device = family.device
    side = min(family.resolution // family.codec.factor, MEASURED_SIDE)
    shape = (DRAWS, family.codec.channels, side, side)
    noise = torch.randn(shape, generator=generator(0, "prior strength"))[draw : draw + 1].to(device)
    last = family.schedule.steps - 1
    timesteps = torch.linspace(0.6 * last, 0.95 * last, DRAWS, device=device).long()[draw : draw + 1]
    square = (side * family.codec.factor, side * family.codec.factor)
    return family.predict(noise, timesteps, cond, [Geometry(square, (0, 0), square)]).float()
