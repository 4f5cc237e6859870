"""What keeps sources from being compared plainly: other prompts, other numbers of images, drawn otherwise."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.evaluation.base import Pictures


def uneven(pictures: Sequence[Pictures]) -> list[str]:
    """Sentences on the sources that can't be compared plainly with the first one."""
    first = pictures[0]
    others = [item.name for item in pictures[1:] if _counts(item) != _counts(first)]
    told = [f"{', '.join(others)}: other prompts or numbers of images than {first.name}: compare with care"]
    return [*(told if others else []), *_drawn_otherwise(pictures)]


def _counts(pictures: Pictures) -> dict[tuple[str, str], int]:
    pairs = zip(pictures.prompts, pictures.files, strict=True)
    return {(prompt.plain, prompt.group): len(files) for prompt, files in pairs}


def _drawn_otherwise(pictures: Sequence[Pictures]) -> list[str]:
    """Sources that were drawn with other settings than the first one: each run has its own guidance and size."""
    drawn = [item for item in pictures if "sampling" in item.about]
    told = []
    for item in drawn[1:]:
        first, own = drawn[0].about["sampling"], item.about["sampling"]
        apart = [f"{name} {own[name]} instead of {first[name]}" for name in own if own[name] != first[name]]
        if apart:
            told.append(f"{item.name}: other settings than {drawn[0].name} ({', '.join(apart)}): compare with care")
    return told
