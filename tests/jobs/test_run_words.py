"""What {token} and {noun} become, and words that would not say what was meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_train import LORA, settings

from finetune.config.load import parse_recipe
from finetune.core.errors import BadInput
from finetune.data.tokens import describe
from finetune.families.source import load_family
from finetune.jobs.plan import plan
from finetune.jobs.prepare import Prepared, prepare
from finetune.jobs.words import filled_prompts
from finetune.runs.plan import plan_rows
from finetune.runs.record import RecordedSubject, RunRecord

INVERSION = {"kind": "textual_inversion", "init": "mug"}


def job(base: Path, photos: Path, method: dict[str, Any] = LORA, begun: bool = False, **sections: Any) -> Prepared:
    data = {"photos": str(photos), "class_noun": "mug"} | sections.pop("data", {})
    sections = {"prior": {"kind": "none"}, **sections}
    return prepare(parse_recipe(settings(base, photos, method, data=data, **sections)), begun=begun)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"data": {"templates": ["a {Token} {noun}"]}}, r"data\.templates has '\{Token\}'"),
        ({"data": {"templates": ["a {token}", "a { colour } {token}"]}}, r"'\{ colour \}'"),
        ({"sample": {"prompts": ["{token} in {place}"]}}, r"sample\.prompts has '\{place\}'"),
        ({"sample": {"negative": "a {noun}"}}, r"sample\.negative has '\{noun\}'"),
        ({"prior": {"kind": "class_images", "prompt": "a {Noun}"}}, r"prior\.prompt has '\{Noun\}'"),
        ({"prior": {"kind": "class_images", "negative": "{x}"}}, r"prior\.negative has '\{x\}'"),
        ({"data": {"class_noun": "{token} mug"}}, r"data\.class_noun is '\{token\} mug'"),
        ({"data": {"class_noun": "Zwx", "token": "zwx", "token_pieces": 9}}, "both 'Zwx'"),
        ({"data": {"token": "<|endoftext|>"}}, "a mark of the tokenizer"),
        ({"data": {"token": "a<|endoftext|>", "token_pieces": 9}}, "a mark of the tokenizer"),
        ({"data": {"token": "{noun}", "token_pieces": 9}}, r"data\.token is '\{noun\}'"),
    ],
)
def test_words_that_are_refused(
    sections: dict[str, Any], said: str, tiny_bases: dict[str, Path], photos: Path
) -> None:
    with pytest.raises(BadInput, match=said):
        job(tiny_bases["sd1"], photos, **sections)


def test_a_caption_files_typo_is_named(tiny_bases: dict[str, Path], photos: Path) -> None:
    """A run that was begun with it goes on."""
    (photos / "1.txt").write_text("a {tokn} {noun}")
    with pytest.raises(BadInput, match=r"the caption of 1\.png has '\{tokn\}'"):
        job(tiny_bases["sd1"], photos)
    assert job(tiny_bases["sd1"], photos, begun=True).captions[1] == ["a {tokn} mug"]
    (photos / "1.txt").write_text("a {red, round} {noun}")
    assert job(tiny_bases["sd1"], photos).captions[1] == ["a {red, round} mug"]


def test_a_template_without_the_token(tiny_bases: dict[str, Path], photos: Path) -> None:
    """It teaches a new word nothing; a LoRA may learn from it, and the plan warns."""
    data = {"templates": ["a {token}", "a mug"]}
    with pytest.raises(BadInput, match=r"data\.templates has 'a mug' without \{token\}"):
        job(tiny_bases["sd1"], photos, INVERSION, data=data)
    assert "WARNING: no token in 'a mug'" in job(tiny_bases["sd1"], photos, data=data).subjects[0].summary
    for number in range(3):
        (photos / f"{number}.txt").write_text("a {token}")
    assert job(tiny_bases["sd1"], photos, INVERSION, data=data).captions == [["a <subject>"]] * 3


def test_a_mark_of_the_tokenizer_is_no_rare_token(tiny_bases: dict[str, Path]) -> None:
    tokenizers = load_family(str(tiny_bases["sd1"])).word_tokenizers
    found = describe(tokenizers, "<|endoftext|>")
    assert not found.good
    assert "no word" in found.verdict
    assert "no word" not in describe(tokenizers, "mug").verdict


@pytest.mark.parametrize(
    ("token", "said"),
    [("httr", "'httr' is an abbreviation (Hail to the Redskins"), ("sks", "a rifle"), ("zwx", None), ("auto", None)],
)
def test_the_plan_says_what_a_token_means(
    token: str, said: str | None, tiny_bases: dict[str, Path], photos: Path
) -> None:
    """It is not refused; a token that the toolkit chose has no meaning."""
    rows = plan_rows(plan(job(tiny_bases["sd1"], photos, data={"token": token, "token_pieces": 9})))
    assert "data.token=auto" in rows["known token"] if said else "known token" not in rows
    assert (said or "") in rows.get("known token", "")


def test_a_new_word_has_no_meaning(tiny_bases: dict[str, Path], photos: Path) -> None:
    rows = plan_rows(plan(job(tiny_bases["sd1"], photos, INVERSION, data={"token": "httr"})))
    assert "known token" not in rows


def test_a_run_fills_in_its_words() -> None:
    run = RunRecord(token="zwx", class_noun="mug")
    assert filled_prompts(["a {token} {noun}", "a tree", "a tree"], run) == ["a zwx mug", "a tree", "a tree"]
    both = [RecordedSubject(token=word, class_noun="mug", photos=1) for word in ("zwx", "vtx")]
    several = run.model_copy(update={"subjects": both})
    assert filled_prompts(["a {token} {noun}", "a {noun}"], several) == ["a zwx mug", "a vtx mug", "a mug"]


@pytest.mark.parametrize(
    ("prompt", "record", "said"),
    [
        ("a {token}", RunRecord(), r"has \{token\}, but what you draw from does not say it"),
        ("a {noun}", RunRecord(token="zwx"), r"has \{noun\}, but"),
        ("a {Token}", RunRecord(token="zwx", class_noun="mug"), r"the prompt has '\{Token\}'"),
    ],
)
def test_a_prompt_with_nothing_to_fill_in(prompt: str, record: RunRecord, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        filled_prompts([prompt], record)


def test_a_token_that_is_the_noun_is_refused_before_the_base_is_read(photos: Path) -> None:
    nowhere = Path("/nowhere/base")
    with pytest.raises(BadInput, match="both 'mug'"):
        job(nowhere, photos, data={"token": "Mug"})
    for data in ({"class_noun": "auto"}, {"token": "zwx"}):
        with pytest.raises(BadInput, match="/nowhere/base"):
            job(nowhere, photos, data=data)
    with pytest.raises(BadInput, match="/nowhere/base"):  # <mug> is a word of its own
        job(nowhere, photos, INVERSION, data={"token": "mug"})
