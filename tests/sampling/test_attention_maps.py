"""Cross-attention maps: the numbers of a plain softmax(QK^T), of the prompt's rows only, and the image unchanged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from finetune.core.errors import BadInput
from finetune.families.base import Family
from finetune.families.source import load_family
from finetune.methods.lora import LoRA
from finetune.methods.textual_inversion import TextualInversion
from finetune.sampling.attention_maps import AttentionMap, AttentionRecorder, has_maps, positions, words_of
from finetune.sampling.draw import draw
from finetune.sampling.settings import Sampling

PROMPT = "a photo of zwx mug"


class ByHand:
    """An attention processor in plain steps that keeps its probabilities [rows, heads, places, tokens]."""

    def __init__(self, kept: list[Tensor]) -> None:
        self.kept = kept

    def __call__(self, attn: Any, hidden: Tensor, encoder_hidden_states: Tensor | None = None, **rest: Any) -> Tensor:
        text = hidden if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            layer(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, x in ((attn.to_q, hidden), (attn.to_k, text), (attn.to_v, text))
        )
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * attn.scale
        read = scores.exp() / scores.exp().sum(-1, keepdim=True)
        if encoder_hidden_states is not None:
            self.kept.append(read)
        return attn.to_out[0]((read @ v).transpose(1, 2).flatten(2))


@contextmanager
def by_hand(family: Family) -> Iterator[list[Tensor]]:
    unet: Any = family.parts["denoiser"]
    before, kept = unet.attn_processors, []
    unet.set_attn_processor({name: ByHand(kept) for name in before})
    yield kept
    unet.set_attn_processor(before)


def recorded(family: Family, words: Sequence[tuple[str, Sequence[str]]], sampling: Sampling) -> tuple[Any, Any]:
    with AttentionRecorder(family, words, sampling.batch_size) as recorder:
        images = draw(
            family,
            [prompt for prompt, _ in words],
            sampling,
            seeds=range(len(words)),
            advance=recorder.next_batch,
        )
    return images, recorder.maps


def with_lora(base: Path) -> Family:
    family = load_family(str(base))
    method = LoRA(rank=2)
    method.attach(family, 0)
    generator = torch.Generator().manual_seed(1)
    state = {
        name: torch.randn(value.shape, generator=generator) / 2 for name, value in method.state_dict(family).items()
    }
    method.load_state_dict(family, state)
    return family


@pytest.mark.parametrize(("name", "guidance"), [("sd1", 1.0), ("sd1", 4.0), ("sdxl", 4.0), ("sdxl-refiner", 4.0)])
def test_maps_are_the_probabilities_of_the_words_tokens(
    name: str, guidance: float, tiny_bases: dict[str, Path]
) -> None:
    """The mean over layers, heads and steps, computed apart, with a LoRA on the attention. Two images in one batch."""
    family = with_lora(tiny_bases[name])
    sampling = Sampling(steps=2, guidance=guidance)
    words = [(PROMPT, ["zwx", "mug"]), ("a red dog", ["dog"])]
    images, maps = recorded(family, words, sampling)
    with by_hand(family) as kept:
        draw(family, [prompt for prompt, _ in words], sampling, seeds=range(2))
    sides = {round(read.shape[2] ** 0.5) for read in kept}
    assert len(sides) == 1, "then no map is scaled"
    (side,) = sides
    for image, tokens in enumerate(([4, 5], [3])):
        rows = [read[-2:][image] for read in kept]  # the prompt's rows follow the negative prompt's
        assert all(len(read) == (2 if guidance == 1 else 4) for read in kept)
        for found, token in zip(maps[image], tokens, strict=True):
            expected = torch.cat(rows)[:, :, token].mean(0).view(side, side)
            torch.testing.assert_close(found.at(side), expected, rtol=1e-3, atol=1e-6)
    assert [found.word for found in maps[0]] == ["zwx", "mug"]
    assert not torch.allclose(maps[0][0].at(side), maps[0][1].at(side), rtol=1e-2)
    assert len(images) == 2


def test_the_image_has_the_same_bits_and_nothing_stays(tiny_bases: dict[str, Path]) -> None:
    family, sampling = with_lora(tiny_bases["sdxl"]), Sampling(steps=2, batch_size=2)
    words = [(PROMPT, ["zwx"]), (PROMPT, []), ("a dog", ["dog"])]
    images, maps = recorded(family, words, sampling)
    plain = draw(family, [prompt for prompt, _ in words], sampling, seeds=range(3))
    assert all(np.array_equal(one, other) for one, other in zip(images, plain, strict=True))
    assert [[found.word for found in each] for each in maps] == [["zwx"], [], ["dog"]]
    with pytest.raises(KeyError), AttentionRecorder(family, words, 2):  # an error ends it too
        raise KeyError
    assert not any(module._forward_hooks for module in family.parts["denoiser"].modules())


def test_batches_do_not_change_a_map(tiny_bases: dict[str, Path]) -> None:
    family, words = load_family(str(tiny_bases["sd1"])), [(PROMPT, ["mug"])] * 3
    _, together = recorded(family, words, Sampling(steps=2, batch_size=3))
    _, apart = recorded(family, words, Sampling(steps=2, batch_size=2))
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one[0].at(32), other[0].at(32), rtol=1e-3, atol=1e-6)
    assert not torch.equal(together[0][0].at(32), together[1][0].at(32)), "each seed has a map of its own"


def test_an_edits_prompt_is_the_first_of_three_parts(wide_bases: dict[tuple[str, str], Path]) -> None:
    family, sampling = load_family(str(wide_bases["sd1", "edit"])), Sampling(steps=2, guidance=4.0)
    _, maps = recorded(family, [(PROMPT, ["zwx"])], sampling)
    with by_hand(family) as kept:
        draw(family, [PROMPT], sampling, seeds=[0])
    assert all(len(read) == 3 for read in kept)
    side = round(kept[0].shape[2] ** 0.5)
    expected = torch.cat([read[0] for read in kept])[:, :, 4].mean(0).view(side, side)
    torch.testing.assert_close(maps[0][0].at(side), expected, rtol=1e-3, atol=1e-6)


def test_maps_of_several_sizes_are_scaled_up_and_added() -> None:
    """Constant maps stay constant, so the mean is known: 3 calls of probability .5 and 1 of .1."""
    found = AttentionMap("mug", {4: torch.full((4, 4), 1.5), 8: torch.full((8, 8), 0.1)}, 4)
    torch.testing.assert_close(found.at(32), torch.full((32, 32), 0.4))


def test_positions_of_words(tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases["sdxl"]))
    assert positions(family, PROMPT, "zwx") == [4]
    assert positions(family, "a mug on a mug", "mug") == [2, 5]
    assert positions(family, "a photo of zwx mug", "zwx mug") == [4, 5]
    for prompt in ("a photo of a dog", "", "a dog " * 30 + "mug"):
        with (
            pytest.warns(match="longer") if len(prompt) > 99 else nullcontext(),
            pytest.raises(BadInput, match="has no 'mug' to draw a map of"),
        ):
            positions(family, prompt, "mug")
    assert words_of(family, "a zwx dog", ["zwx", "mug", "dog"]) == ["zwx", "dog"]
    with pytest.raises(BadInput, match="has no 'zwx'"):
        AttentionRecorder(family, [("a mug", ["zwx"])], 1)


def test_a_new_word_has_the_positions_of_all_its_vectors(tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases["sd1"]))
    word = TextualInversion(vectors=3).add_subject_token(family, "zwx", "mug")
    assert positions(family, f"a photo of {word} mug", word) == [4, 5, 6]


def test_only_unets_have_maps(tiny_bases: dict[str, Path]) -> None:
    found = {name for name, base in tiny_bases.items() if has_maps(load_family(str(base)))}
    assert found == {"sd1", "sd2", "sdxl", "sdxl-refiner"}
