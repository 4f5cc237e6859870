"""Rare tokens: facts of the real CLIP vocabulary, and the prior strength on small bases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from conftest import SHARED

from finetune.data import tokens
from finetune.families.registry import FAMILIES
from finetune.families.source import load_family

REAL = SHARED / "clip-vocab"


@pytest.fixture(scope="module")
def clip() -> transformers.CLIPTokenizer:
    if not REAL.is_dir():
        pytest.skip("the real CLIP vocabulary is not here")
    import json

    merges = [tuple(line.split()) for line in (REAL / "merges.txt").read_text().splitlines()[1:48895]]
    vocab = json.loads((REAL / "vocab.json").read_text())
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def test_known_facts_of_clips_vocabulary(clip: transformers.CLIPTokenizer) -> None:
    words = {t.removesuffix("</w>"): n for t, n in clip.get_vocab().items() if t.endswith("</w>")}
    short = {t: n for t, n in words.items() if t.isascii() and t.isalpha() and len(t) <= 3}
    assert len(clip) == 49408
    assert (words["sks"], words["ohwx"], words["tok"]) == (48136, 47993, 27010)
    assert len([t for t, n in short.items() if n >= 40000]) == 627


def test_sks_is_a_rifle_and_zwx_is_two(clip: transformers.CLIPTokenizer) -> None:
    sks = tokens.describe([clip], "sks")
    assert sks.single
    assert not sks.good
    assert "rifle" in sks.verdict
    zwx = tokens.describe([clip], "zwx")
    assert not zwx.single
    assert "+" in zwx.verdict
    tok = tokens.describe([clip], "tok")
    assert tok.single
    assert not tok.good
    assert tokens.describe([clip], "ohwx").rank > 0.95


def test_rare_tokens_of_clip_are_what_they_should_be(clip: transformers.CLIPTokenizer) -> None:
    found = tokens.rare_tokens([clip, clip])
    assert len(found) > 30
    assert "sks" not in found
    for text in found:
        token = tokens.describe([clip], text)
        assert token.good, token
        assert len(clip(text)["input_ids"]) == 3


@pytest.mark.parametrize("name", list(FAMILIES))
def test_suggestions_are_single_in_every_tokenizer(name: str, tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases[name]))
    found = tokens.suggest(family, 3, "mug")
    assert len(found) == 3
    for token in found:
        assert all(len(t(token.text)["input_ids"]) == 3 for t in family.word_tokenizers)
        assert token.text not in ("mug", "sks", "dog")


def test_the_best_are_told_apart_and_then_weak(tiny_bases: dict[str, Path]) -> None:
    """Every candidate measured: the first suggestion is among the third that moves the embedding most, and there is
    no weaker prior in that third."""
    family = load_family(str(tiny_bases["sd1"]))
    found = tokens.suggest(family, 1000, "mug", measured=1000)
    moved = {token.text: tokens.embedding_distance(family, token.text, "mug") for token in found}
    third = sorted(moved, key=lambda text: -moved[text])[: -(-len(found) // 3)]
    strengths = {text: tokens.prior_strength(family, text, "mug") for text in third}
    assert len(found) >= 6
    assert found[0].text == min(strengths, key=lambda text: strengths[text])


def test_embedding_distance_is_that_of_the_encoder(tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases["sd1"]))
    hidden = family.encode_prompts(["a photo of zwx mug", "a photo of mug"])["hidden"]
    wanted = float((hidden[0] - hidden[1]).pow(2).sum().sqrt() / hidden[1].pow(2).sum().sqrt())
    assert tokens.embedding_distance(family, "zwx", "mug") == pytest.approx(wanted, rel=1e-5)


def test_a_token_in_one_tokenizer_only_is_refused(tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases["sd1"]))

    class Other:
        """A tokenizer that cuts everything into letters."""

        def tokenize(self, text: str) -> list[str]:
            return list(text)

    assert tokens.rare_tokens([family.tokenizers[0], Other()]) == []


def test_prior_strength_is_zero_for_a_token_that_changes_nothing(tiny_bases: dict[str, Path]) -> None:
    """With the text encoder's embedding of the token set to that of an empty word, hidden states still shift by
    position; so the check is made on the denoiser: without cross attention nothing can change."""
    family = load_family(str(tiny_bases["sd1"]))
    assert tokens.prior_strength(family, "zwx", "mug") > 0
    with torch.no_grad():
        for name, parameter in family.parts["denoiser"].named_parameters():
            if "attn2.to_out" in name:
                parameter.zero_()
    assert tokens.prior_strength(family, "zwx", "mug") == 0


def test_check_measures_single_tokens_only(tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases["sd1"]))
    assert tokens.check(family, "zwx", "mug").strength is not None
    assert tokens.check(family, "unknownword").strength is None
