"""Recipes are read without the libraries that train them: a mistake in one is told in a moment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.config import recipes

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "numpy", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "datasets")

LOADED = f"""
import json, sys
print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))
"""
NEEDED = ["data.photos=x", "data.class_noun=dog"]


def heavy_after(code: str) -> list[str]:
    """Which of the heavy libraries a fresh interpreter has imported when it has run `code`."""
    done = subprocess.run(
        [sys.executable, "-c", code + LOADED],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "module",
    ["finetune.config.recipe", "finetune.config.load", "finetune.methods.registry", "finetune.optim.registry"],
)
def test_settings_are_imported_without_torch(module: str) -> None:
    assert heavy_after(f"import {module}") == []


def test_every_shipped_recipe_is_read_and_written_without_torch() -> None:
    code = f"""
from finetune.config import recipes
from finetune.config.load import dump_recipe, load_recipe
for name in recipes.names():
    recipe = load_recipe(name, {NEEDED!r})
    assert "photos: " in dump_recipe(recipe)
"""
    assert recipes.names()
    assert heavy_after(code) == []


@pytest.mark.parametrize(("command", "shown"), [("show demo", "method:"), ("list", "dreambooth-lora")])
def test_commands_about_recipes_need_no_torch(command: str, shown: str) -> None:
    code = f"""
import contextlib, io
from finetune.cli.main import run
out = io.StringIO()
with contextlib.redirect_stdout(out):
    assert run("recipes {command}".split()) == (0, "")
assert {shown!r} in out.getvalue()
"""
    assert heavy_after(code) == []


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("train dmo", "did you mean 'demo'"),
        ("train demo run.stesp=4", "'run.steps'"),
        ("plan demo run.steps=0", "steps"),
    ],
)
def test_mistakes_are_told_before_torch_is_imported(command: str, said: str) -> None:
    code = f"""
from finetune.cli.main import run
code, message = run({command!r}.split())
assert code == 2 and {said!r} in message, message
"""
    assert heavy_after(code) == []


def test_the_package_shows_what_it_has_without_loading_it() -> None:
    code = """
import finetune
for name in ("train", "resume", "load_recipe", "Recipe", "open_result", "draw", "export_result", "Sampling", "Stop"):
    assert name in dir(finetune) and name in finetune.__all__, name
assert finetune.Recipe and finetune.load_recipe and finetune.BadInput
"""
    assert heavy_after(code) == []


def test_what_it_looks_for_is_found_where_it_is() -> None:
    assert "torch" in heavy_after("import finetune.families.base")
