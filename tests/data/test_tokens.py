"""Rare tokens: facts of the real CLIP vocabulary, and the prior strength on small bases."""

from __future__ import annotations

import shutil
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import SHARED

from finetune.data import meanings, strengths, tokens
from finetune.families.registry import FAMILIES
from finetune.families.source import load_family
from finetune.testing.tiny import write_tiny

ROOT = Path(__file__).parents[2]
REAL = SHARED / "clip-vocab"


@pytest.fixture(scope="module")
def clip() -> transformers.CLIPTokenizer:
    if not REAL.is_dir():
        pytest.skip("the real CLIP vocabulary is not here")
    return benchmark().clip_tokenizer(REAL)


def benchmark() -> Any:
    """benchmarks/tokens.py, which has the name of a module here."""
    found = spec_from_file_location("tokens_benchmark", ROOT / "benchmarks" / "tokens.py")
    assert found is not None
    assert found.loader is not None
    module = module_from_spec(found)
    found.loader.exec_module(module)
    return module


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
    assert "weather" in tokens.describe([clip], "ohwx").verdict


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
    """Every candidate measured: the first suggestion is among the third that moves every prompt most, and there is
    no weaker prior in that third."""
    family = load_family(str(tiny_bases["sd1"]))
    found = tokens.suggest(family, 1000, "mug", measured=1000)
    words = [token.text for token in found]
    moved = dict(zip(words, strengths.movements(family, words, "mug").amin(1).tolist(), strict=True))
    third = sorted(moved, key=lambda text: -moved[text])[: -(-len(found) // 3)]
    priors = {text: strengths.prior_strengths(family, [text], "mug")[0] for text in third}
    assert len(found) >= 6
    assert found[0].text == min(priors, key=lambda text: priors[text])


def test_movements_are_those_of_the_encoder(tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases["sd1"]))
    found = strengths.movements(family, ["vtx", "zwx"], "mug")
    assert found.shape == (2, len(strengths.PROMPTS))
    for index, prompt in enumerate(strengths.PROMPTS):
        texts = [prompt.format("zwx mug"), prompt.format("mug")]
        hidden = family.encode_prompts(texts)["hidden"]
        wanted = float((hidden[0] - hidden[1]).pow(2).sum().sqrt() / hidden[1].pow(2).sum().sqrt())
        assert float(found[1, index]) == pytest.approx(wanted, rel=1e-4)
    token = tokens.check(family, "zwx", "mug")
    assert token.distance == pytest.approx(float(found[1].min()), rel=1e-4)


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
    assert strengths.prior_strengths(family, ["zwx"], "mug")[0] > 0
    with torch.no_grad():
        for name, parameter in family.parts["denoiser"].named_parameters():
            if "attn2.to_out" in name:
                parameter.zero_()
    assert strengths.prior_strengths(family, ["zwx"], "mug") == [0]


def test_check_measures_single_tokens_only(tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases["sd1"]))
    assert tokens.check(family, "zwx", "mug").strength is not None
    assert tokens.check(family, "unknownword").strength is None


KNOWN_BEFORE = "httr nwsl fdny dprk ysl tvxq snf hgtv wwdc fck".split()  # picks of the rule without lists


@pytest.mark.parametrize("text", [*KNOWN_BEFORE, "ohwx", "ilwx", "sks", "cpus", "wftv", "japs", "olaf", "SNF"])
def test_what_means_something_is_known(text: str) -> None:
    assert meanings.meaning_of(text)


def test_the_lists_say_one_thing_of_each_token() -> None:
    listed, pieces = meanings.explained(), meanings.pieces()
    assert not set(listed) & set(pieces)
    assert len(listed) > 1500
    assert len(pieces) >= 50
    assert all(text.isalpha() and text.islower() and meaning for text, meaning in [*listed.items(), *pieces.items()])
    assert meanings.meaning_of("httr") == "an abbreviation (Hail to the Redskins, a football slogan)"
    assert meanings.meaning_of("zwx") is None


def test_the_page_has_the_tokens_that_the_lists_give(clip: transformers.CLIPTokenizer) -> None:
    """docs/tokens.md: made again with `python benchmarks/tokens.py` after a change of the lists."""
    assert (ROOT / "docs" / "tokens.md").read_text(encoding="utf-8") == benchmark().page(clip)


def test_candidates_of_clip_were_looked_at(clip: transformers.CLIPTokenizer) -> None:
    found = tokens.rare_tokens([clip])
    assert len(found) >= 50
    assert set(found) == set(meanings.pieces())
    for text in found:
        ids = clip(text)["input_ids"][1:-1]
        assert len(ids) == 1
        assert clip.decode(ids).strip() == text
    short = [text for text in tokens._rare_words([clip]) if 3 <= len(text) <= 4 and text.isascii() and text.isalpha()]
    assert not [text for text in short if not meanings.meaning_of(text) and text not in meanings.pieces()]


@pytest.fixture(scope="module")
def real_words(clip: transformers.CLIPTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random SD 1.x base that reads CLIP's real vocabulary."""
    folder = tmp_path_factory.mktemp("real") / "base"
    write_tiny("sd1", folder)
    shutil.rmtree(folder / "tokenizer")
    clip.save_pretrained(folder / "tokenizer")
    config = transformers.CLIPTextConfig.from_pretrained(folder / "text_encoder")
    config.vocab_size, config.max_position_embeddings = len(clip), 77
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 49406, 49407, 49407
    torch.manual_seed(0)
    transformers.CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    return folder


def test_picks_on_the_real_vocabulary(real_words: Path) -> None:
    family = load_family(str(real_words))
    found = [token.text for token in tokens.suggest(family, 3, "mug")]
    assert found == [token.text for token in tokens.suggest(load_family(str(real_words)), 3, "mug")]
    assert len(found) == 3
    assert set(found) <= set(meanings.pieces())
    assert not set(found) & (set(KNOWN_BEFORE) | set(meanings.explained()))


def test_neighbours_and_movement_leave_candidates_out(real_words: Path) -> None:
    """The best pick, once its row lies among common words, or is so large that it moves prompts as nothing else."""
    family = load_family(str(real_words))
    best = tokens.suggest(family, 1, "mug")[0].text
    tokenizer, encoder = family.tokenizers[0], family.parts["text_encoder"]
    table = encoder.get_input_embeddings().weight
    row = tokenizer.convert_tokens_to_ids(best + "</w>")
    kept = table[row].clone()
    words = [tokenizer.convert_tokens_to_ids(f"{word}</w>") for word in ("house", "garden", "street", "church")]
    with torch.no_grad():
        table[words] = table[words[0]] + 1e-3 * torch.randn(
            4, table.shape[1], generator=torch.Generator().manual_seed(0)
        )
        table[row] = table[words[0]]
    assert best not in [token.text for token in tokens.suggest(family, 8, "mug")]
    with torch.no_grad():
        table[row] = 50 * kept
    assert best not in [token.text for token in tokens.suggest(family, 8, "mug")]


def test_nearest_is_the_mean_of_the_largest_cosines() -> None:
    table = torch.randn(30, 6, generator=torch.Generator().manual_seed(1))
    table -= table.mean(0)
    wanted = []
    for row in (0, 20):
        cosines = [torch.cosine_similarity(table[row], table[n], dim=0) for n in range(10, 30) if n != row]
        wanted.append(float(torch.stack(sorted(cosines, reverse=True)[: strengths.NEIGHBOURS]).mean()))
    assert strengths.nearest(table, [0, 20], range(10, 30)).tolist() == pytest.approx(wanted, abs=1e-5)


def test_picks_on_the_shipped_base_are_those_of_the_results() -> None:
    """docs/results.md was measured with these words."""
    family = load_family("tiny")
    assert [tokens.suggest(family, 1, noun)[0].text for noun in ("mug", "car", None)] == ["wzd", "qzjk", "wzd"]


def test_a_known_word_gets_a_sentence(clip: transformers.CLIPTokenizer) -> None:
    assert "'httr' is an abbreviation (Hail to the Redskins" in tokens.describe([clip], "httr").warning
    assert "'tiger' is a common token" in tokens.describe([clip], "tiger").warning
    assert tokens.describe([clip], "zwx").warning == ""
    assert tokens.describe([clip], "toid").warning == ""
