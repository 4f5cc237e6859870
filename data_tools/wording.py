"""What is wrong with the captions of a set: missing, too long, without the token, tags that contradict each other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Tags of which an image has one at most, as booru sites and taggers write them. Only certain ones: a wrong alarm costs
# more trust than a missed one.
OF_SCENE = (
    {"indoors", "outdoors"}, {"day", "night"}, {"monochrome", "colorful"}, {"from above", "from below"},
    {"full body", "close-up"}, {"blurry", "sharp focus"}, {"1girl", "no humans"}, {"1boy", "no humans"},
    {"solo", "no humans"}, {"solo", "2girls"}, {"solo", "2boys"}, {"1girl", "2girls"}, {"1boy", "2boys"},
)  # fmt: skip
OF_ONE = (
    {"open mouth", "closed mouth"}, {"standing", "sitting", "lying"}, {"short hair", "long hair"},
)  # fmt: skip  # of a single figure
BRACES = re.compile(r"\{\s*[\w-]+\s*\}")  # as training finds places that nothing fills in
FEWEST = 3  # comma-separated parts: a caption with fewer is a sentence
LONGEST_TAG = 5  # words: of a longer part the caption is a sentence


@dataclass(frozen=True)
class Wanted:
    """What captions are checked against. `tokenizers`: of each text encoder, with the tokens that it reads; `token`:
    the word that must be in every caption, or empty."""

    tokenizers: Sequence[tuple[Any, int]] = ()
    token: str = ""


@dataclass(frozen=True)
class CaptionFaults:
    """Problems of one caption, and notes that need no action."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def split_tags(caption: str) -> list[str]:
    """The comma-separated parts of a caption, without those that are empty."""
    return [part for part in (part.strip() for part in caption.split(",")) if part]


def is_tag_list(caption: str) -> bool:
    """Whether a caption is a list of tags rather than a sentence."""
    tags = split_tags(caption)
    return len(tags) >= FEWEST and all(len(tag.split()) <= LONGEST_TAG for tag in tags)


def plain_tag(tag: str) -> str:
    """A tag as it is compared: in lower case, with spaces, without weights and escapes such as (red_hair:1.2)."""
    text = tag.strip().lower().lstrip("( ")
    while text.endswith(")") and not text.endswith("\\)") and _open(text) < 0:
        text = text[:-1].rstrip()
    return re.sub(r"(?<=.):[\d.]+$", "", text).replace("\\", "").replace("_", " ").strip()


def _open(text: str) -> int:
    """How many brackets without a backslash are open at the end; below 0 if more were closed."""
    plain = re.sub(r"\\.", "", text)
    return plain.count("(") - plain.count(")")


def check_caption(caption: str, wanted: Wanted) -> CaptionFaults:
    """Returns what is wrong with one caption. {token} in it counts as the token."""
    faults = CaptionFaults()
    _length(caption, wanted, faults)
    left = BRACES.search(caption.replace("{token}", "").replace("{noun}", ""))
    if left:
        faults.problems.append(f"training refuses {left[0]!r} in its caption: leave the braces out")
    if wanted.token and "{token}" not in caption and not _has_word(caption, wanted.token):
        faults.problems.append(f"the token {wanted.token!r} is not in its caption")
    if is_tag_list(caption):
        _tags([plain_tag(tag) for tag in split_tags(caption)], faults)
    return faults


def _length(caption: str, wanted: Wanted, faults: CaptionFaults) -> None:
    for tokenizer, length in wanted.tokenizers:
        ids = tokenizer(caption.replace("{token}", "sks"), truncation=False)["input_ids"]
        if len(ids) > length:
            cut = tokenizer.decode(ids[length - 1 : -1]).strip()
            faults.problems.append(
                f"the caption has {len(ids)} tokens and the base reads {length}: {_short(cut)!r} is cut"
            )
            return


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."


def _tags(tags: list[str], faults: CaptionFaults) -> None:
    there = set(tags)
    for group in (*OF_SCENE, *(OF_ONE if "solo" in there else ())):
        both = sorted(group & there)
        if len(both) > 1:
            faults.problems.append(f"tags that contradict each other: {' and '.join(both)}")
    twice = sorted({tag for tag in tags if tags.count(tag) > 1})
    if twice:
        faults.notes.append(f"tags that stand twice: {', '.join(twice)}")


def _has_word(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word.lower())}(?!\w)", text.lower()) is not None


def read_wanted(folder: Path | None, token: str) -> Wanted:
    """What a base's folder (None: no base) asks of captions."""
    if folder is None:
        return Wanted((), token)
    from finetune.families.registry import family_of

    return Wanted(tuple(family_of(folder).tokenizers_of(folder)), token)
