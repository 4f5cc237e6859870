"""How strongly a frozen base reacts to a token: its text encoders, its embedding table and its denoiser."""

from __future__ import annotations

from collections.abc import Sequence
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


@torch.no_grad()
def prior_strengths(family: Family, texts: Sequence[str], noun: str, draws: int = 4) -> list[float]:
    """Returns |eps(a photo of T N) - eps(a photo of N)| / |eps(a photo of N) - eps()| for each token T of `texts`.

    eps is the frozen base's prediction for `draws` samples of fixed noise at fixed timesteps. Near 0, the base ignores
    the token. At 1, the token changes the prediction as much as the class noun does.
    """
    prompts = [f"a photo of {noun}", "", *[f"a photo of {text} {noun}" for text in texts]]
    family.parts.place(family.text_encoders)
    encoded = [family.encode_prompts([prompt]) for prompt in prompts]
    conditions = [{name: value.repeat_interleave(draws, 0) for name, value in each.items()} for each in encoded]
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
