"""The tiny base keeps its promises: held-out combinations, rare tokens, size, readers, judge, VAE, obedience."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "tiny_base"))

import captions  # noqa: E402
import evaluate  # noqa: E402
import judge  # noqa: E402
import world  # noqa: E402
from tokenizer import RARE  # noqa: E402

BASE = ROOT / "finetune" / "tiny_base"


def test_training_never_shows_a_held_out_combination() -> None:
    asked = {facts for _, facts in evaluate.prompts(400)}
    shown = {world.training_facts(np.random.default_rng((2, index))) for index in range(4000)}
    assert len(asked) > 100
    assert not asked & shown
    assert all(len({getattr(facts, name) for facts in asked}) == len(words) for name, words in judge.HEADS.items())


def test_pictures_are_functions_of_seed_and_index() -> None:
    first, facts = world.world_picture(3, 17)
    again, same = world.world_picture(3, 17)
    other, _ = world.world_picture(3, 18)
    assert facts == same
    assert np.array_equal(np.asarray(first), np.asarray(again))
    assert not np.array_equal(np.asarray(first), np.asarray(other))


def test_captions_state_what_they_should() -> None:
    facts = world.Facts("mug", "red", "striped", "beach")
    rng = np.random.default_rng(0)
    texts = [captions.caption(facts, rng)[0] for _ in range(3000)]
    share = Counter(word for text in texts for word in set(text.split()))
    assert texts.count("") / len(texts) == pytest.approx(0.1, abs=0.02)
    for word in ("red", "striped", "beach"):
        assert share[word] / len(texts) == pytest.approx(0.9 * 0.6, abs=0.04)
    assert not {word for text in texts for word in re.findall(r"\w+", text)} & set(RARE)


def test_rare_tokens_are_one_piece_each_with_the_highest_ids() -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer")
    ids = [tokenizer(word)["input_ids"][1:-1] for word in RARE]
    assert all(len(pieces) == 1 for pieces in ids)
    lowest = min(pieces[0] for pieces in ids)
    words = ["a", "photo", "of", "a", "red", "striped", "mug", "on", "the", "beach"]
    assert all(tokenizer(word)["input_ids"][1] < lowest for word in words)
    assert max(pieces[0] for pieces in ids) < tokenizer.bos_token_id < tokenizer.eos_token_id == len(tokenizer) - 1


def test_the_folder_is_small_and_holds_data_only() -> None:
    files = [file for file in BASE.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 24_000_000
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".txt", ".md", ".png"}
    assert json.loads((BASE / "model_index.json").read_text())["requires_safety_checker"] is False


def test_the_judge_knows_renders_it_never_saw() -> None:
    assert all(share >= 0.97 for share in judge.world_rates(judge.load_judge(), count=200).values())


def test_a_subject_is_told_from_its_class() -> None:
    known = judge.load_judge()
    for name in world.SUBJECTS:
        own = [world.subject_picture(name, 7000 + k) for k in range(15)]
        others = [judge.class_picture(name, 7000 + k) for k in range(15)]
        assert sum(judge.is_subject(known, own, name)) >= 14
        assert sum(judge.is_subject(known, others, name)) <= 1


def test_the_vae_gives_pictures_back() -> None:
    from diffusers import AutoencoderKL
    from train_vae import psnr

    vae = AutoencoderKL.from_pretrained(BASE / "vae")
    held = np.stack([np.asarray(world.wild_picture(123, k)) for k in range(24)])
    assert psnr(vae.float(), held) >= 29


@pytest.mark.slow
def test_unseen_combinations_are_drawn_by_diffusers_alone() -> None:
    asked = evaluate.prompts(24)
    images = evaluate.draw(BASE, [text for text, _ in asked], 5000, steps=20, guidance=4.0)
    shares = evaluate.obedience(images, [facts for _, facts in asked])
    assert shares["kind"] >= 0.9
    assert shares["place"] >= 0.9
    assert shares["colour"] >= 0.8
    assert shares["pattern"] >= 0.7
