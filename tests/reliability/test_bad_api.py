"""Bad input to the Python API: a BadInput with one sentence, whatever the type of what is given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import finetune
from finetune.config.load import parse_recipe
from finetune.config.recipe import Recipe
from finetune.core.errors import BadInput
from finetune.runs.folder import RunFolder

GOOD = {"data.photos": "x", "data.class_noun": "dog"}

LOADED: dict[str, tuple[tuple[Any, ...], str]] = {
    "no name": ((None,), "None"),
    "a number": ((5,), "5"),
    "a list": ((["demo"],), "demo"),
    "bytes": ((b"demo",), "demo"),
    "nothing": (("",), "there is no recipe ''"),
    "a name with a NUL": (("de\0mo",), "there is no recipe"),
    "a text as overrides": (("demo", "run.steps=5"), "give a list"),
    "bytes as overrides": (("demo", b"run.steps=5"), "give a list"),
    "a number as overrides": (("demo", 5), "give a list"),
    "None as overrides": (("demo", None), "give a list"),
    "a number among the overrides": (("demo", [5]), "5 is not a setting"),
    "None among the overrides": (("demo", [None]), "None is not a setting"),
    "three in a tuple": (("demo", [("run.steps", 5, 6)]), "is not a setting"),
    "a number as a key": (("demo", {5: 5}), "is not a setting"),
    "an empty key": (("demo", {"": 5}), "is not a setting"),
    "a section of nothing": (("demo", {".steps": 5}), "is not a setting"),
    "a key of nothing": (("demo", {"run.": 5}), "is not a setting"),
    "an object": (("demo", GOOD | {"run.steps": object()}), "run.steps"),
    "a function": (("demo", GOOD | {"method.rank": len}), "method.rank"),
    "a set": (("demo", GOOD | {"run.steps": {5}}), "run.steps is {5}: give a whole number"),
    "a complex number": (("demo", GOOD | {"optim.lr": 1j}), "optim.lr is 1j: give a number"),
    "not a number": (("demo", GOOD | {"optim.lr": float("nan")}), "optim.lr is nan"),
    "True": (("demo", GOOD | {"run.steps": True}), "run.steps is True: give a number"),
    "half a step": (("demo", GOOD | {"run.steps": 1.5}), "give a whole number"),
    "bytes as photos": (("demo", GOOD | {"data.photos": b"\xff"}), "data.photos"),
    "a number as photos": (("demo", GOOD | {"data.photos": 5}), "data.photos is 5: give a path"),
    "photos with a NUL": (("demo", GOOD | {"data.photos": "a\0b"}), "give a path"),
    "a path as a noun": (("demo", {"data.photos": "x", "data.class_noun": 5}), "data.class_noun is 5: give a text"),
    "a class as a method": (("demo", GOOD | {"method": Recipe}), "method.kind is missing"),
    "a text as data": (("demo", {"data": "photos"}), "data is 'photos'"),
    "the base as a number": (("demo", GOOD | {"base": 5}), "base is 5"),
    "the base as a dictionary": (("demo", GOOD | {"base": {"source": None}}), "base.source is None: give a text"),
}


@pytest.mark.parametrize("name", LOADED)
def test_load_recipe_says_what_is_wrong(name: str) -> None:
    given, said = LOADED[name]
    with pytest.raises(BadInput) as refused:
        finetune.load_recipe(*given)
    sentence = str(refused.value)
    assert said in sentence
    assert "\n" not in sentence
    assert len(sentence) < 500


PARSED: dict[str, Any] = {"none": None, "text": "x", "list": [], "number": 5, "bytes": b"x", "object": object()}


@pytest.mark.parametrize("name", PARSED)
def test_parse_recipe_wants_sections(name: str) -> None:
    with pytest.raises(BadInput, match="instead of sections"):
        parse_recipe(PARSED[name])


@pytest.mark.parametrize("given", ["demo", None, 5, {}, RunFolder(Path("x"))], ids=lambda given: type(given).__name__)
def test_train_wants_a_recipe(given: Any) -> None:
    with pytest.raises(BadInput, match=r"train needs a recipe, not .*load_recipe"):
        finetune.train(given)


@pytest.mark.parametrize("given", [None, 5, b"x", [], object()], ids=lambda given: type(given).__name__)
def test_resume_wants_a_folder(given: Any) -> None:
    with pytest.raises(BadInput, match="give the folder of a run"):
        finetune.resume(given)


CALLS: dict[str, Callable[[Recipe, Path], Any]] = {
    "a number as the folder": lambda recipe, path: finetune.train(recipe, 5),  # type: ignore[arg-type]
    "a list as the folder": lambda recipe, path: finetune.train(recipe, []),  # type: ignore[arg-type]
    "an empty folder's name": lambda recipe, path: finetune.train(recipe, ""),
    "a file as the folder": lambda recipe, path: finetune.train(recipe, path / "photos" / "0.png"),
    "photos as the folder": lambda recipe, path: finetune.train(recipe, path / "photos"),
    "nothing to resume": lambda recipe, path: finetune.resume(""),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_folder_that_is_none_is_named(
    name: str, photos: Path, tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"data.photos": photos, "data.class_noun": "mug", "base": str(tiny_bases["sd1"]), "prior.count": 2}
    recipe = finetune.load_recipe("dreambooth-lora", given)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BadInput, match=r"run folder|run_dir"):
        CALLS[name](recipe, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
