"""The priors' seam: a prior from outside is asked, and never recognised by its class."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field, ValidationError
from test_train import LORA, settings

from finetune.config.recipe import Recipe
from finetune.core.errors import BadInput
from finetune.core.files import load_tensors
from finetune.jobs.estimate import estimate
from finetune.jobs.fit import fit_job
from finetune.jobs.plan import plan
from finetune.jobs.prepare import prepare
from finetune.runs.folder import RunFolder
from finetune.training.accelerate import make_accelerator
from finetune.training.priors.base import PriorSettings
from finetune.training.priors.class_images import ClassImages
from finetune.training.priors.distance import Distance
from finetune.training.priors.none import NoPrior
from finetune.training.priors.registry import PRIORS
from finetune.training.regularizers import PriorContext, Regularizer


class Both(PriorSettings):
    """Class images and the distance to the base at once, made of what is there."""

    predictions: ClassVar[int] = 2
    holds_reference: ClassVar[bool] = True
    needs_distance: ClassVar[bool] = True

    kind: Literal["both"] = "both"
    count: int = 2
    weight: float = 1e-3

    @property
    def prompts(self) -> list[str]:
        return self.class_images.prompts

    @property
    def class_images(self) -> ClassImages:
        return ClassImages(count=self.count, steps=1)

    def regularizers(self, attached: PriorContext) -> list[Regularizer]:
        return Distance(weight=self.weight).regularizers(attached)


@pytest.fixture
def with_both() -> Iterator[Any]:
    """Recipes as they are where `Both` is registered before they are composed."""
    PRIORS.register(Both)

    class WithBoth(Recipe):
        prior: Annotated[reduce(or_, PRIORS.values()), Field(discriminator="kind")] = NoPrior()

    try:
        yield WithBoth
    finally:
        del PRIORS._found["both"]


def test_ours_are_all_there_and_say_their_own_kind() -> None:
    assert list(PRIORS) == ["class_images", "distance", "frozen_base", "none"]
    assert all(entry().kind == kind for kind, entry in PRIORS.items())


def test_what_is_no_prior_is_refused() -> None:
    with pytest.raises(BadInput, match="PriorSettings"):
        PRIORS.register(Recipe)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="PriorSettings"):
        PRIORS.register(PriorSettings)  # it is abstract


def test_a_prior_from_outside_does_all_that_ours_do(
    with_both: Any, tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    """Its class images are drawn and seen; its penalty is in the loss; plan and estimate count both."""
    trained = {}
    for kind in ("class_images", "both"):
        own = {"kind": kind, "count": 2} | ({"weight": 50.0} if kind == "both" else {"steps": 1})
        values = settings(tiny_bases["sd1"], photos, LORA, prior=own)
        recipe = with_both.model_validate(values | {"base": {"source": values["base"]}})
        job = prepare(recipe)
        shown = plan(job).class_images
        assert shown is not None
        assert shown.count == 2
        path = tmp_path / kind
        path.mkdir()
        fit_job(job, RunFolder(path), make_accelerator(recipe.run, True))
        last = sorted((path / "checkpoints").iterdir())[-1]
        trained[kind] = load_tensors(last / "trained.safetensors")
        estimated = estimate(recipe)
        plain = estimate(recipe.model_copy(update={"prior": NoPrior()}))
        assert estimated.activations > 1.5 * plain.activations  # two predictions a photo
    ours, theirs = trained["class_images"], trained["both"]
    assert ours.keys() == theirs.keys()
    grown = {
        kind: sum(float(v.square().sum()) for n, v in held.items() if "lora_B" in n) for kind, held in trained.items()
    }
    assert grown["both"] < grown["class_images"]


def test_a_method_that_can_not_serve_it_is_told_by_its_kind(with_both: Any) -> None:
    values = {"data": {"photos": "x", "class_noun": "mug"}, "optim": {"kind": "adamw"}}
    with pytest.raises(ValidationError, match=r"prior\.kind is both, which method\.kind oft does not measure"):
        with_both.model_validate(values | {"method": {"kind": "oft"}, "prior": {"kind": "both"}})
