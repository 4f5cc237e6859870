"""Images with the token that stayed as the base drew them are named."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from finetune.verdicts.changed import LITTLE, change


def flat(value: int, side: int = 64) -> Image.Image:
    return Image.new("RGB", (side, side), (value, value, value))


def test_the_unit_is_the_difference_of_two_images_of_the_base() -> None:
    found = change([(flat(0), flat(10)), (flat(40), flat(60)), (flat(80), flat(80))], "subject")
    assert found is not None
    assert found.share == pytest.approx(10 / np.mean([40, 80, 40]), abs=1e-4)


def test_images_that_stayed_are_named_and_others_are_not() -> None:
    before = [flat(0), flat(100)]
    stayed = change([(image, image) for image in before], "style")
    assert stayed is not None
    assert stayed.sentence.startswith("The images with the token changed little: by 0% of what")
    assert stayed.sentence.endswith("Look whether they show the style.")
    just = change(
        list(zip(before, [flat(int(100 * LITTLE) + 1), flat(100 - int(100 * LITTLE) - 1)], strict=True)), "x"
    )
    assert just is not None
    assert just.sentence == ""


def test_without_two_different_images_nothing_is_said() -> None:
    assert change([], "subject") is None
    assert change([(flat(1), flat(9))], "subject") is None
    assert change([(flat(1), flat(9)), (flat(1), flat(9))], "subject") is None
