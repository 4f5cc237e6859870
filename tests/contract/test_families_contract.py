"""Every family keeps the contract of `families/base.py`, and a fault against it is seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from finetune.families.registry import FAMILIES
from finetune.families.sd import StableDiffusion1
from finetune.testing import family_contract
from finetune.testing.family_contract import FAMILY_CONTRACT


@pytest.mark.parametrize("promise", FAMILY_CONTRACT, ids=lambda promise: promise.__name__)
@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_family_keeps(name: str, promise: Callable[[Path], None], tiny_bases: dict[str, Path]) -> None:
    promise(tiny_bases[name])


def test_a_family_that_reads_its_neighbours_is_seen(
    tiny_bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = StableDiffusion1.predict

    def leaky(self: StableDiffusion1, noisy: Tensor, *rest: object) -> Tensor:
        return honest(self, noisy, *rest) + noisy.mean()  # type: ignore[arg-type]

    monkeypatch.setattr(StableDiffusion1, "predict", leaky)
    with pytest.raises(AssertionError, match="another sample"):
        family_contract.the_prediction_is_of_the_latents_shape(tiny_bases["sd1"])
