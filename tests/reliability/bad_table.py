"""The table of bad inputs: where a case works, and how it is added.

The cases themselves are in `test_bad_input`, `bad_settings` and `bad_places`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Place:
    """Where a case works: three photos, bases that it may spoil after `own_base`, and a run after `done`."""

    path: Path
    photos: Path
    bases: dict[str, Path]
    base: Path
    finished: Path

    def done(self) -> Path:
        """A finished run of two steps, to spoil."""
        return Path(shutil.copytree(self.finished, self.path / "done", symlinks=True))

    def own_base(self, name: str = "sd1") -> Path:
        self.base = self.path / "base"
        shutil.copytree(self.bases[name], self.base)
        return self.base

    def train(self, *overrides: str, recipe: str = "dreambooth-lora") -> list[str]:
        own = (
            "data.class_noun=mug",
            "prior.kind=class_images",
            "prior.count=2",
            "prior.others=null",
            "prior.steps=1",
            "sample.steps=1",
            "sample.count=1",
        )
        run_dir = f"run.dir={self.path / 'run'}"
        return ["train", recipe, f"base={self.base}", f"data.photos={self.photos}", run_dir, *own, *overrides]

    def captioned(self, file: str, text: str, *overrides: str) -> list[str]:
        """Training on the photos with a caption file beside them."""
        (self.photos / file).write_text(text)
        return self.train(*overrides)

    def recipe(self, text: str | bytes) -> list[str]:
        file = self.path / "recipe.yaml"
        file.write_bytes(text.encode() if isinstance(text, str) else text)
        return ["train", str(file)]

    def sample(self, source: Path, base: str = "sd1") -> list[str]:
        return ["sample", str(source), "-p", "a mug", "--base", str(self.bases[base]), "--out", str(self.path / "out")]


Case = tuple[Callable[[Place], list[str]], tuple[str, ...]]
CASES: dict[str, Case] = {}


def case(*words: str) -> Callable[[Callable[[Place], list[str]]], Callable[[Place], list[str]]]:
    def add(make: Callable[[Place], list[str]]) -> Callable[[Place], list[str]]:
        assert make.__name__ not in CASES, make.__name__
        CASES[make.__name__] = (make, words)
        return make

    return add


def setting(name: str, *overrides: str, words: tuple[str, ...]) -> None:
    """A case that is nothing but overrides of a good recipe."""
    assert name not in CASES, name
    CASES[name] = (lambda place: place.train(*overrides), words)
