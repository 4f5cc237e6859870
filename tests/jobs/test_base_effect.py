"""A setting that does nothing with the recipe's base is refused by name, before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.config.load import parse_recipe
from finetune.config.recipe import Recipe
from finetune.core.errors import BadInput
from finetune.families.source import load_family
from finetune.jobs import train as job
from finetune.jobs.prepare import prepare


def recipe_of(base: Path, photos: Path, *overrides: str) -> Recipe:
    plain = {
        "base": str(base),
        "data": {"photos": str(photos), "class_noun": "mug"},
        "method": {"kind": "lora", "rank": 2},
        "optim": {"kind": "adamw", "lr": 1e-3},
        "run": {"steps": 2, "checkpoint_every": 1},
        "sample": {"count": 1, "steps": 1, "prompts": ["a photo of {token} {noun}"]},
        "export": {"verify": "off"},
    }
    return parse_recipe(plain, overrides)


# (family, a setting that does nothing with it, what is said, a family with which it does something)
USELESS = [
    ("sd1", "data.mask_count=3", "data.mask_count is 3 but the base reads no inpaint inputs", None),
    ("sd1", "data.edit_dropout=0.1", "data.edit_dropout is 0.1 but the base reads no edit inputs", None),
    ("sd1", "sample.image_guidance=2", "sample.image_guidance is 2.0 but the base reads no edit inputs", None),
    (
        "sd1",
        "objective.density.mean=1",
        "objective.density.mean is 1.0 but objective.density is auto, which is",
        "sd3",
    ),
    ("sd1", "objective.logit_std=2", "which is uniform for this base, so it has no effect", "sd3"),
    ("flux", "sample.negative=blurry", "sample.negative is 'blurry' but flux reads no negative prompt", "sd1"),
    ("flux", "prior.negative=blurry", "prior.negative is 'blurry' but flux reads no negative prompt", "sd3"),
]


@pytest.mark.parametrize(("name", "setting", "said", "other"), USELESS)
def test_it_is_refused_by_name(
    name: str, setting: str, said: str, other: str | None, tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    before = [
        *(["objective.density.kind=auto"] if "density" in setting else []),
        *(["prior.kind=class_images"] if "prior" in setting else []),
    ]
    with pytest.raises(BadInput) as caught:
        job.train(recipe_of(tiny_bases[name], photos, *before, setting), tmp_path / "run")
    assert said in str(caught.value)
    assert "so it has no effect: leave it out" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    if other is not None:
        prepare(recipe_of(tiny_bases[other], photos, *before, setting))


def test_the_inputs_of_a_base_are_not_asked_for_again(
    tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    family = load_family(str(tiny_bases["sd1"]))
    family.widen("inpaint")
    family.drawing.pipeline().save_pretrained(tmp_path / "base")
    prepare(recipe_of(tmp_path / "base", photos, "data.mask_count=3"))
    with pytest.raises(BadInput, match=r"base\.inputs is inpaint but the base reads inpaint inputs without it"):
        prepare(recipe_of(tmp_path / "base", photos, "base.inputs=inpaint"))


@pytest.mark.parametrize("name", ["sd1", "flux", "sd3"])
def test_a_resolved_recipe_asks_for_nothing_that_the_base_has_not(
    name: str, tiny_bases: dict[str, Path], photos: Path
) -> None:
    resolved = recipe_of(tiny_bases[name], photos).model_dump(mode="json")
    prepare(parse_recipe(resolved))


def test_a_run_that_was_begun_goes_on_with_what_it_was_given(
    tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    """As one of an earlier version, which did not refuse it."""
    run = job.train(recipe_of(tiny_bases["sd1"], photos), tmp_path / "run")
    file = run / "recipe.yaml"
    file.write_text(file.read_text(encoding="utf-8").replace("mask_count: 8", "mask_count: 3"), encoding="utf-8")
    with pytest.raises(BadInput, match=r"data\.mask_count is 3"):
        job.train(job.RunFolder(run).recipe, tmp_path / "another")
    job.resume(run)
