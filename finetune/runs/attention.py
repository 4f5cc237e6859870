"""RUN/attention: maps of where the images after training read the run's words. Names and order of the files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

FOLDER = "attention"
SEEDS = 2  # the images of each prompt that have maps


def words_of_run(subjects: Iterable[tuple[str, str | None]]) -> list[str]:
    """Returns the words to draw maps of, from the tokens and class nouns of the subjects."""
    return list(dict.fromkeys(word for pair in subjects for word in pair if word))


def file_of(prompt: int, seed: int, word: int) -> Path:
    """Returns the file's path in the folder: prompt number, seed, and position in `words_of_run`."""
    return Path(f"{prompt:02d}-{seed}-{word}.png")
