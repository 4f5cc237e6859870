"""The words of a run: what {token} and {noun} become, and what would go into prompts as braces or as another word."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from finetune.config.recipe import Recipe
from finetune.core.errors import BadInput
from finetune.data.decoding import shown
from finetune.data.tokens import special_in
from finetune.families.base import Family
from finetune.jobs.subjects import Subject
from finetune.runs.record import RunRecord
from finetune.training.priors.base import CAPTION

PLACEHOLDER = re.compile(r"\{\s*[\w-]+\s*\}")
ADVICE = "write {token} or {noun}, or leave the braces out"


def refuse_words(recipe: Recipe, family: Family, subjects: Sequence[Subject]) -> None:
    """Raises: BadInput: a token, a class noun, a template or a prompt that would not say what was meant."""
    own_word = "embedding" in recipe.method.artifacts
    for subject in subjects:
        _refuse_names(subject.token, subject.noun or "")
        if not own_word:
            _refuse_special(family, subject.token)
    if own_word:
        _refuse_templates_without_token(recipe, subjects)
    _refuse_unknown(recipe, subjects)


def refuse_given_words(recipe: Recipe) -> None:
    """Raises: BadInput: a token that was given can't be used, whatever the base is: known before the base is read."""
    if "embedding" not in recipe.method.artifacts:
        for subject in recipe.data.all_subjects:
            _refuse_names("" if subject.token == "auto" else subject.token, subject.class_noun or "")


def filled_prompts(prompts: Sequence[str], record: RunRecord) -> list[str]:
    """Prompts with {token} and {noun} of the run with this record; one for each of its subjects.

    Raises:
        BadInput: the result is of no run, or has no class noun, or the placeholder is another one.
    """
    subjects = [(subject.token, subject.class_noun) for subject in record.subjects]
    subjects = subjects or [(record.token, record.class_noun)]
    found = [_filled(prompt, *subject) for prompt in prompts for subject in subjects]
    return list(dict.fromkeys(found)) if len(subjects) > 1 else found


def _filled(prompt: str, token: str, noun: str | None) -> str:
    for name, word in (("{token}", token), ("{noun}", noun)):
        if name in prompt and not word:
            raise BadInput(f"the prompt {prompt!r} has {name}, but what you draw from does not say it: write the word")
        prompt = prompt.replace(name, word or "")
    _refuse_braces("the prompt", [prompt])
    return prompt


def _refuse_names(token: str, noun: str) -> None:
    for key, word in (("token", token), ("class_noun", noun)):
        if PLACEHOLDER.search(word):
            raise BadInput(f"data.{key} is {word!r}: write the word itself, without braces")
    if noun and token.lower() == noun.lower():
        raise BadInput(
            f"data.token and data.class_noun are both {noun!r}, so that the class would become the subject: give "
            "another token, or leave it out (auto)"
        )


def _refuse_special(family: Family, token: str) -> None:
    special = special_in(family.word_tokenizers, token)
    if special:
        raise BadInput(
            f"the token {token!r} has {special!r}, which is a mark of the tokenizer and no word: find one with "
            "`finetune tokens suggest`"
        )


def _refuse_templates_without_token(recipe: Recipe, subjects: Sequence[Subject]) -> None:
    """A method that learns a word learns nothing from a prompt without it."""
    used = any(item.source == "template" for subject in subjects for item in subject.captioned)
    without = [template for template in recipe.data.templates if "{token}" not in template]
    if used and without and not recipe.data.trigger:
        raise BadInput(
            f"data.templates has {without[0]!r} without {{token}}, and method.kind {recipe.method.kind} learns "
            "nothing but that word: write {token} into it"
        )


def _refuse_unknown(recipe: Recipe, subjects: Sequence[Subject]) -> None:
    """What is left in braces after {token} and {noun} were filled in."""
    for subject in subjects:
        _refuse_braces("data.trigger", [subject.trigger])
        for item in subject.captioned:
            where = "data.templates" if item.source == "template" else f"the caption of {shown(item.photo.path.name)}"
            _refuse_braces(where, item.captions)
        _refuse_braces("sample.prompts", map(subject.fill, recipe.sample.prompts))
        _refuse_braces("prior.prompt", [subject.fill(text).replace(CAPTION, "") for text in recipe.prior.prompts])
    _refuse_braces("sample.negative", [recipe.sample.negative])
    if recipe.prior.class_images is not None:
        _refuse_braces("prior.negative", [recipe.prior.class_images.negative])


def _refuse_braces(where: str, texts: Iterable[str]) -> None:
    for text in texts:
        found = PLACEHOLDER.search(text)
        if found:
            raise BadInput(f"{where} has {found[0]!r} ({text!r}), which is not a known placeholder: {ADVICE}")
