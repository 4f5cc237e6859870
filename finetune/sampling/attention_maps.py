"""Where an image reads a word: cross-attention maps (DAAM, arXiv:2210.04885), recorded while the image is drawn.

Hooks read the queries and keys that the UNet computes anyway, adapters included. Nothing that the UNet computes is
changed, so the image has the same bits with and without them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from finetune.core.errors import BadInput
from finetune.families.base import Family
from finetune.families.unet import UNetFamily


def has_maps(family: Family) -> bool:
    """Whether the family's denoiser reads the prompt by cross-attention: the families with a UNet."""
    return isinstance(family, UNetFamily)


def positions(family: Family, prompt: str, word: str) -> list[int]:
    """Returns the positions of a word's tokens in the denoiser's text, for every place where the prompt has the word.

    SDXL's two tokenizers cut a text alike, so the first one's positions hold for both.

    Raises:
        BadInput: the prompt does not have the word, or only beyond the length that the text encoder reads.
    """
    found = _places(family, prompt, word)
    if not found:
        raise BadInput(f"the prompt {prompt!r} has no {word!r} to draw a map of: give a word of the prompt")
    return found


def words_of(family: Family, prompt: str, words: Sequence[str]) -> list[str]:
    """Returns those of `words` that the prompt has, within the length that the text encoder reads."""
    return [word for word in words if _places(family, prompt, word)]


def _places(family: Family, prompt: str, word: str) -> list[int]:
    """As `positions`, but empty where the prompt does not have the word."""
    assert isinstance(family, UNetFamily)
    text = family.tokenize(0, [prompt])[0].tolist()
    wanted = family.tokenizers[0](word, add_special_tokens=False)["input_ids"]
    starts = [at for at in range(len(text)) if wanted and text[at : at + len(wanted)] == wanted]
    return [at + k for at in starts for k in range(len(wanted))]


@dataclass(frozen=True)
class AttentionMap:
    """The attention that one image pays to one word.

    `sums` holds, for each side s of the UNet's feature maps, the sum [s, s] of the word's probabilities over layers,
    heads and steps; `count` is the number of (layer, head, step) in all of them together.
    """

    word: str
    sums: dict[int, Tensor]
    count: int

    def at(self, side: int) -> Tensor:
        """Returns the map [side, side], float32: the mean probability in [0, 1] with which each place reads the word.

        It is DAAM's sum over layers, heads and steps, each scaled up to the image, divided by their number.
        """
        size = (side, side)
        scaled = [interpolate(each[None, None], size, mode="bicubic")[0, 0] for each in self.sums.values()]
        return (torch.stack(scaled).sum(0) / max(1, self.count)).clamp(0, 1)


class AttentionRecorder:
    """Records the maps of words while images are drawn inside its block:

        with AttentionRecorder(family, words, batch_size) as recorder:
            draw(family, prompts, ..., advance=recorder.next_batch)

    Args:
        family: one with a UNet (`has_maps`), with its adapters.
        words: for each image, in the order of drawing, its prompt and the words to record; none for no map.
        batch_size: `Sampling.batch_size`.

    Attributes:
        maps: the maps of each image that was drawn.

    Raises:
        BadInput: a prompt does not have one of its words.
    """

    def __init__(self, family: Family, words: Sequence[tuple[str, Sequence[str]]], batch_size: int) -> None:
        self.family, self.words, self.batch_size = family, words, batch_size
        self.maps: list[list[AttentionMap]] = []
        self._positions = [[positions(family, prompt, word) for word in chosen] for prompt, chosen in words]
        self._queries: dict[nn.Module, Tensor] = {}
        self._hooks: list[Any] = []
        self._begin()

    def __enter__(self) -> AttentionRecorder:
        for layer in cross_attention(self.family):
            self._hooks.append(layer.to_q.register_forward_hook(partial(self._keep_query, layer)))
            self._hooks.append(layer.to_k.register_forward_hook(partial(self._read_key, layer)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._queries.clear()

    def next_batch(self, amount: int) -> None:
        """Ends a batch of `amount` images: what follows belongs to the next ones."""
        for index in range(amount):
            _, words = self.words[len(self.maps)]
            sums = {side: found.cpu() for side, found in self._sums[index].items()}
            self.maps.append(
                [
                    AttentionMap(word, {side: found[number] for side, found in sums.items()}, self._count)
                    for number, word in enumerate(words)
                ]
            )
        self._begin()

    def _begin(self) -> None:
        self._sums: list[dict[int, Tensor]] = [{} for _ in range(self.batch_size)]
        self._count = 0

    def _keep_query(self, layer: nn.Module, module: nn.Module, given: Any, query: Tensor) -> None:
        self._queries[layer] = query

    @torch.no_grad()
    def _read_key(self, layer: nn.Module, module: nn.Module, given: Any, key: Tensor) -> None:
        query, heads = self._queries.pop(layer), int(layer.heads)  # type: ignore[arg-type]
        first = len(self.maps)
        count = min(self.batch_size, len(self.words) - first)
        rows = conditional_rows(len(key), count)
        self._count += heads
        for index, row in enumerate(rows):
            chosen = self._positions[first + index]
            if chosen:
                self._add(index, probabilities(query[row], key[row], heads), chosen)

    def _add(self, index: int, read: Tensor, chosen: Sequence[Sequence[int]]) -> None:
        """Adds one layer's probabilities [heads, places, tokens] to an image's sums [words, side, side]."""
        side = math.isqrt(read.shape[1])  # images are square
        by_token = read.sum(0)
        found = torch.stack([by_token[:, where].sum(1).view(side, side) for where in chosen])
        sums = self._sums[index]
        sums[side] = sums[side] + found if side in sums else found


def cross_attention(family: Family) -> list[Any]:
    """Returns the cross-attention layers of a UNet, in order; none for other denoisers."""
    if not has_maps(family):
        return []
    return [
        module for module in family.parts["denoiser"].modules() if getattr(module, "is_cross_attention", False) is True
    ]


def conditional_rows(rows: int, count: int) -> range:
    """Returns the rows of a UNet's batch that read the prompts, of `rows` for `count` images.

    diffusers' pipelines put the negative prompt's rows first under guidance. For edits there are three parts, and the
    prompt's is the first (arXiv:2211.09800 eq. 3).
    """
    start = 0 if rows == 3 * count else rows - count
    return range(start, start + count)


def probabilities(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """Returns softmax(q k^T / sqrt(d)) [heads, places, tokens], float32, of one image.

    `query` [places, heads * d] and `key` [tokens, heads * d] are the outputs of the layer's projections.
    """
    with torch.autocast(query.device.type, enabled=False):
        q, k = (each.float().unflatten(-1, (heads, -1)).transpose(0, 1) for each in (query, key))
        return torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), dim=-1)
